"""How fast the cores are and how far apart."""

import os
import time

import pytest

from deploy.host.core_probe import CoreProbe
from deploy.host.cpu import physical_cores

several = pytest.mark.skipif(physical_cores() < 2, reason="a handoff needs two cores")


@several
def test_a_handoff_takes_longer_than_a_step_and_less_than_a_thread_takes_to_wake_up() -> None:
    with CoreProbe() as probe:
        found = [probe.measure() for _ in range(5)]
    for state in found:
        assert state is not None
        assert state.handoff_us is not None
        assert 1 < state.step_ns < 1e3 * state.handoff_us < 20e3


def test_its_process_sleeps_between_two_measurements_and_ends_with_it() -> None:
    with CoreProbe() as probe:
        assert probe.measure() is not None
        process = probe._process
        assert process is not None
        time.sleep(0.01)  # it has printed, and goes back to its pipe
        clock = time.clock_gettime(~process.pid << 3 | 2)
        time.sleep(0.05)
        assert time.clock_gettime(~process.pid << 3 | 2) == clock
    assert process.poll() is not None
    assert probe.measure() is None


def test_nothing_is_known_once_its_process_has_died() -> None:
    with CoreProbe() as probe:
        assert probe._process is not None
        probe._process.kill()
        probe._process.wait()
        assert probe.measure() is None


def test_one_core_hands_nothing_over() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(allowed)])
    try:
        with CoreProbe() as probe:
            state = probe.measure()
    finally:
        os.sched_setaffinity(0, allowed)
    assert state is not None
    assert state.step_ns > 1
    assert state.handoff_us is None


def test_an_interpreter_that_cannot_be_started_leaves_it_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/interpreter")
    with CoreProbe() as probe:
        assert probe.measure() is None
