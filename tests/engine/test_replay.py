"""When a CUDA graph is captured, replayed and dropped; the device counts, and nothing is computed."""

import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest

from deploy.engine.replay import WORTH, Replay
from deploy.errors import BackendError


class Counting:
    """A device whose graphs count their launches."""

    def __init__(self) -> None:
        self.captures = self.launches = 0
        self.refuses = False

    def capture(self, work: Callable[[], None], stream: object) -> Any:
        assert not gc.isenabled()
        if self.refuses:
            raise BackendError("fake reason")
        work()
        self.captures += 1
        return self

    def launch(self, stream: object) -> None:
        self.launches += 1


class Runs:
    """A replay, and the plain runs of its work."""

    def __init__(self, device: Counting, *, wanted: bool = True) -> None:
        self.replay = Replay(device, object(), wanted=wanted)  # type: ignore[arg-type]
        self.plain = 0

    def run(self, times: int = 1, bound: str = "a") -> None:
        for _ in range(times):
            self.replay.run(self._launch, bound, lambda: f"shape {bound}")

    def _launch(self) -> None:
        self.plain += 1


def test_the_second_run_in_a_row_is_captured_and_replayed_from_then_on() -> None:
    runs = Runs(device := Counting())
    runs.run()
    assert (runs.plain, device.captures) == (1, 0)
    runs.run(4)
    assert (runs.plain, device.captures, device.launches) == (2, 1, 4)  # the second plain one was captured, not run


def test_after_a_drop_the_next_run_is_a_plain_one_again() -> None:
    runs = Runs(device := Counting())
    runs.run(WORTH + 1)
    runs.replay.drop()
    runs.run()
    assert (device.captures, device.launches) == (1, WORTH)
    runs.run()
    assert (device.captures, device.launches) == (2, WORTH + 1)


def test_graphs_that_do_not_pay_are_captured_later_and_later() -> None:
    runs = Runs(device := Counting())
    for _ in range(40):
        runs.run(5)
        runs.replay.drop()
    assert device.captures == 3  # after 1, 2 and 4 plain runs in a row; the next would be after 8
    runs.run(8 + WORTH)
    runs.replay.drop()
    runs.run(2)
    assert device.captures == 5  # one has paid


def test_what_cannot_be_captured_is_said_once_and_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    device = Counting()
    device.refuses = True
    runs = Runs(device)
    with caplog.at_level(logging.WARNING):
        runs.run(4)
        runs.run(4, "b")
    assert [record.getMessage() for record in caplog.records] == [
        f"no CUDA graph for shape {bound}: fake reason; it runs without" for bound in "ab"
    ]
    assert (runs.plain, device.launches) == (8, 0)
    assert gc.isenabled()


def test_where_no_graph_is_wanted_none_is_captured() -> None:
    runs = Runs(device := Counting(), wanted=False)
    runs.run(5)
    assert (runs.plain, device.captures) == (5, 0)
    runs.replay.wanted = True
    runs.run()
    assert device.captures == 1
