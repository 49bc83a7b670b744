"""How fast the cores are and how far apart."""

import os
import time
from pathlib import Path

import pytest

from deploy.host.core_probe import CoreProbe, CoreState, best_known, best_of, remember
from deploy.host.cpu import physical_cores


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine its process takes more than a second to start."""
    monkeypatch.setattr("deploy.host.core_probe.LIMIT_S", 30.0)


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


GOOD, FAR, SLOW = (
    CoreState(step_ns=10.9, handoff_us=0.16), CoreState(step_ns=10.4, handoff_us=0.34), CoreState(step_ns=18.1, handoff_us=0.15)
)  # fmt: skip


def test_the_best_of_each_figure_is_known_to_later_programs_for_a_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert best_known() is None
    for state, best in (
        (GOOD, GOOD),
        (FAR, CoreState(step_ns=10.4, handoff_us=0.16)),
        (SLOW, CoreState(step_ns=10.4, handoff_us=0.15)),
    ):
        remember(state)
        assert best_known() == best
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 86401)
    assert best_known() is None
    remember(SLOW)
    assert best_known() == SLOW


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"of": [], "since": 0, "best": {}}'])
def test_a_damaged_record_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "cores.json").write_bytes(content)
    assert best_known() is None
    remember(GOOD)
    assert best_known() == GOOD


def test_other_cores_have_a_best_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember(GOOD)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {4097})
    assert best_known() is None


def test_the_best_of_one_core_has_no_handoff() -> None:
    assert best_of([]) is None
    one = CoreState(step_ns=10.9, handoff_us=None)
    assert best_of([one]) == one
    assert best_of([one, FAR]) == FAR
