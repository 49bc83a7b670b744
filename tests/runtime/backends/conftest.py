"""Engines run here on the simulated GPU, which says that it is simulated: `tests/simulator`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.artifact.artifact import Artifact
from tests.simulator.artifacts import make_engine
from tests.simulator.simulated import Simulated


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    """A GPU that is reached through cuda-python. At the end of a test no rule was broken and no work is left behind."""
    found = Simulated(monkeypatch, library="cuda-python")
    yield found
    found.finish()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Artifact]:
    """Makes an engine artifact: input x (batch, 4) float32, `y = 2 x`; see `make_engine`."""
    return lambda **options: make_engine(tmp_path / "engine", **options)
