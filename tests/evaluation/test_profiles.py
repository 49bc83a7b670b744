"""Batches that an engine takes, on the simulated GPU: `y = 2 x`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.errors import InputError
from deploy.evaluation.labelled import Batch, run_batch
from deploy.evaluation.profiles import filled, filled_rows, nearest_batch
from deploy.runtime.load import open_session
from deploy.runtime.session import Session, SessionOptions
from tests.simulator.artifacts import make_engine
from tests.simulator.simulated import Simulated

Open = Callable[..., Session]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Open]:
    """`opened((1, 4), (8, 9))`: a session on an engine with these profiles."""
    simulated = Simulated(monkeypatch)
    sessions: list[Session] = []

    def open_one(*profiles: tuple[int, int]) -> Session:
        sessions.append(open_session(make_engine(tmp_path / str(len(sessions)), profiles=profiles), "tensorrt"))
        return sessions[-1]

    yield open_one
    for session in sessions:
        session.close()
    simulated.finish()


@pytest.mark.parametrize(
    ("profiles", "wanted", "size"),
    [
        ([(1, 8)], 32, 8),
        ([(1, 8)], 8, 8),
        ([(1, 8)], 3, 3),
        ([(5, 7)], 32, 7),
        ([(5, 7)], 2, 5),
        ([(1, 1), (24, 24)], 32, 24),
        ([(1, 1), (24, 24)], 16, 1),
        ([(24, 32), (2, 4)], 16, 4),
        ([(24, 32), (2, 4)], 1, 2),
    ],
)
def test_files_come_in_the_largest_batch_that_is_taken(
    opened: Open, profiles: list[tuple[int, int]], wanted: int, size: int
) -> None:
    found, reason = nearest_batch(opened(*profiles), wanted, "")
    assert found == size
    assert reason.startswith("it takes batches of ") == (size != wanted)


@pytest.mark.parametrize(
    ("profiles", "rows", "filled"),
    [([(5, 7)], 1, 5), ([(5, 7)], 6, 6), ([(1, 1), (24, 24)], 2, 24), ([(1, 1), (24, 24)], 1, 1), ([(1, 4), (3, 9)], 5, 5)],
)
def test_rows_that_are_too_few_are_filled_up_with_the_last(
    opened: Open, profiles: list[tuple[int, int]], rows: int, filled: int
) -> None:
    session = opened(*profiles)
    assert filled_rows(session, rows) == filled
    x = np.arange(4 * rows, dtype=np.float32).reshape(rows, 4)
    results = run_batch(session, Batch({"x": x}, None, (Path("a"),) * rows), None)
    assert results is not None
    np.testing.assert_array_equal(results["y"][:rows], 2 * x)
    np.testing.assert_array_equal(results["y"][rows:], np.repeat(2 * x[-1:], filled - rows, axis=0))


def test_more_rows_than_any_profile_takes_are_left_to_the_session(opened: Open) -> None:
    session = opened((1, 2))
    feed: dict[str, Any] = {"x": np.zeros((3, 4), np.float32)}
    assert filled(session, feed) is feed
    with pytest.raises(InputError, match="outside every profile"):
        run_batch(session, Batch(feed, None, (Path("a"),) * 3), None)


def test_a_backend_of_onnx_files_takes_any_batch(shared_lenet5: Artifact) -> None:
    with open_session(shared_lenet5, "onnxruntime", SessionOptions(device="cpu")) as session:
        assert nearest_batch(session, 1000, "") == (1000, "")
        assert filled_rows(session, 3) == 3
