"""The names of the package, which are loaded when they are first used."""

import subprocess
import sys

import pytest

import deploy


@pytest.mark.parametrize("name", deploy.__all__)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(deploy, name) is getattr(deploy, name)
    assert name in dir(deploy)


def test_a_name_that_it_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'deploy' has no attribute 'lod'"):
        deploy.lod  # noqa: B018


@pytest.mark.parametrize("library", ["torch", "onnx"])
def test_a_name_whose_library_is_missing_says_what_to_install(library: str) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; import deploy; deploy.export"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    said = f"deploy.export needs {library}, which is not installed: pip install 'deploy[export]'"
    assert done.stderr.splitlines()[-1].endswith(said)


def test_names_that_need_no_torch_do_without_it() -> None:
    code = "import sys; sys.modules['torch'] = None; import deploy; deploy.load, deploy.Batcher, deploy.evaluate, deploy.predict"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
