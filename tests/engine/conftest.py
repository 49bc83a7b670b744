import pytest

from deploy.engine.flavour import Flavour, load_flavour


@pytest.fixture(scope="module")
def rtx() -> Flavour:
    return load_flavour("tensorrt-rtx")
