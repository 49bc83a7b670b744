"""Fixtures of the simulator's own tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.artifact.artifact import Artifact
from tests.simulator.artifacts import make_engine
from tests.simulator.simulated import Simulated


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    found = Simulated(monkeypatch)
    yield found
    found.finish()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Artifact]:
    return lambda **options: make_engine(tmp_path / "engine", **options)
