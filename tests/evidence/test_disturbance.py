"""Whether other programs disturbed a measurement, and what that may have done to it."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from deploy.evidence.disturbance import (
    LEAST,
    LIMIT,
    MOST,
    Measured,
    Round,
    Turn,
    Use,
    allowed,
    fewer_threads,
    lengthened,
    reason,
    take_rounds,
    take_turn,
    together,
    undisturbed,
    unmeasured,
    use_between,
)
from deploy.evidence.timing import Ratio, paired_ratio
from deploy.host.core_probe import CoreProbe, CoreState
from deploy.host.cpu_use import Reading
from tests.processors import CORES, processors

QUIET = Use(seconds=1.0, cores=2, threads=2, others_s=0.0, stolen_s=0.0, step_s=0.01, waited_s=0.0)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.5, 0.8])
def test_no_disturbance_of_a_share_of_the_time_lengthens_the_median_more_than_the_bound(share: float) -> None:
    """Any way of spending the time on equal runs: the worst gives it to just over half of them, alike."""
    runs, rng = 1001, np.random.default_rng(0)
    spent = share / (1 - share) * runs  # of share * (runs + spent)
    worst = 0.0
    for hit in (1, 50, 400, 501, 502, 700, runs):
        for weights in (np.ones(hit), rng.random(hit), rng.pareto(1.5, hit)):
            times = np.ones(runs)
            times[:hit] += spent * weights / weights.sum()
            assert spent / times.sum() == pytest.approx(share)
            worst = max(worst, float(np.median(times)))
    assert worst <= lengthened(share) * (1 + 1e-9)
    assert worst == pytest.approx(lengthened(share), rel=2e-3)


def test_the_limit_is_what_makes_a_time_too_long_by_more_than_is_allowed() -> None:
    assert lengthened(LIMIT) == pytest.approx(MOST)
    assert math.isfinite(lengthened(1.0))


def test_an_interval_is_widened_by_what_may_have_lengthened_either_side() -> None:
    ratio = Ratio(value=9.0, low=8.9, high=9.1)
    assert allowed(ratio, QUIET, QUIET) == ratio
    half = replace(QUIET, waited_s=0.5)
    assert allowed(ratio, half, QUIET) == Ratio(value=9.0, low=8.9 / 3, high=9.1)  # the baseline may have been 3 times as fast
    assert allowed(ratio, QUIET, half) == Ratio(value=9.0, low=8.9, high=9.1 * 3)
    nothing = replace(QUIET, others_s=None, stolen_s=None, waited_s=None)
    assert allowed(ratio, nothing, QUIET).low < 0.05


@pytest.mark.parametrize(
    ("change", "share", "quiet"),
    [
        ({}, 0.0, True),
        ({"waited_s": 0.04}, 0.04, True),
        ({"waited_s": 0.06}, 0.06, False),
        ({"waited_s": 1.9}, 1.0, False),  # two threads, both all the time
        ({"others_s": 0.9}, 0.9, False),
        ({"stolen_s": 0.3}, 0.3, False),
        ({"others_s": 1.7}, 1.0, False),
        ({"others_s": -0.02}, 0.0, True),  # the steps of the counters
        ({"others_s": 0.055}, 0.055, True),  # not beyond the limit by more than the steps
        ({"others_s": 0.9, "threads": 1}, 0.0, True),  # the other core is theirs
        ({"others_s": 1.3, "threads": 1}, pytest.approx(0.3), False),
        ({"others_s": 0.9, "threads": 1, "waited_s": 0.2}, 0.2, False),  # but it was not that core that they took
        ({"others_s": 0.01, "threads": 4, "waited_s": 1.0}, 0.01, True),  # four threads on two cores wait for each other
        ({"others_s": None, "stolen_s": None}, 0.0, True),
        ({"others_s": None, "stolen_s": None, "waited_s": 0.2}, 0.2, False),
        ({"waited_s": None}, 0.0, True),
        ({"waited_s": None, "others_s": 0.2}, 0.2, False),
        ({"waited_s": None, "others_s": None, "stolen_s": None}, None, False),  # nothing known is not quiet
    ],
)
def test_what_others_did_is_a_share_of_the_time(change: dict[str, float], share: float | None, quiet: bool) -> None:
    use = replace(QUIET, **change)  # type: ignore[arg-type]
    assert (use.share, use.quiet) == (share, quiet)


def test_others_are_what_is_neither_idle_nor_ours() -> None:
    before = Reading(at_s=10.0, cpus=2, idle_s=100.0, stolen_s=5.0, used_s={1: 7.0, 2: 1.0}, waited_s={2: 1.0, 3: 2.0})
    after = Reading(at_s=12.0, cpus=2, idle_s=100.5, stolen_s=5.25, used_s={1: 7.25, 2: 2.0, 4: 0.125}, waited_s={2: 1.1, 5: 0.2})
    use = use_between(before, after, 2)
    assert use.others_s == pytest.approx(2 * 2.0 - 0.5 - 0.25 - (0.25 + 1.0 + 0.125))
    assert (use.seconds, use.stolen_s) == (2.0, 0.25)
    assert use.waited_s == pytest.approx(0.1 + 0.2)  # a thread that ended is left out, a new one counts whole
    missing = use_between(replace(before, idle_s=None, stolen_s=None), replace(after, waited_s=None), 2)
    assert (missing.others_s, missing.stolen_s, missing.waited_s) == (None, None, None)
    assert len(unmeasured(missing)) == 2
    assert unmeasured(use) == []
    assert "4 threads on 2" in unmeasured(replace(QUIET, threads=4))[0]


def test_a_turn_of_a_quiet_machine_is_quiet_and_one_of_a_busy_machine_is_not() -> None:
    def turn() -> Use:
        return take_turn(os.getpid(), 1, lambda: [time.sleep(0.2) or 0.2]).use

    with processors():
        assert turn().quiet
    cores = len(os.sched_getaffinity(0))
    with processors(others=cores):
        busy = turn()
    assert not busy.quiet
    assert busy.others_cores == pytest.approx(busy.cores, rel=0.15)
    with processors(waiting=0.4):
        waited = turn()
    assert not waited.quiet
    assert waited.waited_share == pytest.approx(0.4, rel=0.1)


def round_of(waited: float = 0.0, others: float = 0.0, *, base_s: float = 2.0, own_s: float = 1.0) -> Round[str]:
    """A round of two turns of a second: the baseline's threads waited, and others ran in both."""
    use = replace(QUIET, others_s=others)
    return Round({"base": Turn(samples_s=[base_s], use=replace(use, waited_s=waited)), "own": Turn(samples_s=[own_s], use=use)})


class Clock:
    """Stands still until it is moved: how long rounds take is not left to the machine."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr("deploy.evidence.disturbance.time", made)
    with processors():
        yield made


def test_disturbed_rounds_are_taken_again(clock: Clock) -> None:
    rounds = [round_of(0.3 if turn in (1, 3) else 0.0, base_s=turn) for turn in range(20)]
    taken: list[Round[str]] = []

    def take(turn: int) -> Round[str]:
        clock.now += 1
        return rounds[turn]

    take_rounds(take, 5, taken)
    assert taken == rounds[:7]
    measured = Measured.of(taken, 5)
    assert measured.samples_s("base") == [[0], [2], [4], [5], [6]]
    assert measured.certain("base")
    assert measured.certain("own")


def test_rounds_end_where_the_machine_does_not_become_quiet_and_the_least_disturbed_are_left(clock: Clock) -> None:
    taken: list[Round[str]] = []

    def take(turn: int) -> Round[str]:
        clock.now += 1
        return round_of(0.9 - 0.03 * turn, base_s=turn)

    take_rounds(take, 5, taken)
    assert len(taken) == 15  # 5 s, and 10 s more
    measured = Measured.of(taken, 5)
    assert measured.rounds == taken[-5:]
    assert not measured.certain("base")
    assert not measured.certain("own")  # not one of its turns was disturbed, but its ratio is to the baseline of those rounds
    ratio = measured.ratio("base", "own")
    plain = paired_ratio(measured.samples_s("base"), measured.samples_s("own"))
    assert ratio.low == pytest.approx(plain.low / lengthened(measured.use("base").share or 0))
    assert ratio.high == plain.high
    assert measured.ratio("base", "base") == Ratio(value=1.0, low=1.0, high=1.0)


def test_a_few_undisturbed_rounds_are_enough_and_fewer_are_not() -> None:
    for quiet, certain in ((LEAST, True), (LEAST - 1, False)):
        rounds = [round_of(0.0 if turn < quiet else 0.5) for turn in range(15)]
        measured = Measured.of(rounds, 15)
        assert measured.certain("base") == certain
        assert len(measured.rounds) == (quiet if certain else 15)


FAR, SLOW_CORES = replace(CORES, handoff_us=0.34), replace(CORES, step_ns=18.1)


def like(*states: CoreState, threads: int = 2, best: CoreState | None = None) -> Round[str]:
    """An undisturbed round with the cores like this; its times are those that lenet5 has then."""
    use = replace(QUIET, threads=threads)
    base_s, own_s = (
        (0.297e-3, 0.056e-3) if FAR in states else (0.41e-3, 0.035e-3) if SLOW_CORES in states else (0.252e-3, 0.028e-3)
    )
    made = Round({"base": Turn(samples_s=[base_s], use=use), "own": Turn(samples_s=[own_s], use=use)})
    made.cores, made.best = states, best
    return made


@pytest.mark.parametrize(
    ("states", "kept"),
    [
        ([(CORES, CORES)] * 3, [0, 1, 2]),
        ([(CORES, FAR), (FAR, FAR), (CORES, CORES), (FAR, CORES)], [2]),
        ([(SLOW_CORES, CORES), (FAR, CORES), (CORES, CORES), (CORES, CORES)], [2, 3]),
        ([(CORES, replace(CORES, step_ns=12.5, handoff_us=0.2)), (CORES, CORES)], [0, 1]),  # within the limits
        ([(replace(CORES, handoff_us=None),), (replace(SLOW_CORES, handoff_us=None),)], [0]),  # one core
        ([(FAR, FAR)] * 3, [0, 1, 2]),  # nobody knows better
        ([(), ()], [0, 1]),  # not known
        ([], []),
    ],
)
def test_rounds_with_the_cores_slower_or_farther_apart_than_in_others_are_disturbed(
    states: list[tuple[CoreState, ...]], kept: list[int]
) -> None:
    rounds = [like(*each) for each in states]
    assert [id(each) for each in undisturbed(rounds)] == [id(rounds[index]) for index in kept]


def test_a_measurement_that_only_sees_less_than_is_known_is_uncertain() -> None:
    for state, times, said in ((FAR, 0.34 / 0.16, "2.1 times as far apart"), (SLOW_CORES, 18.1 / 10.9, "1.7 times as slow")):
        measured = Measured.of([like(state, state, best=CORES)] * 15, 15)
        assert not measured.certain("own")
        assert measured.reason("base", "own") == f"a hypervisor kept the cores from their best, most of the time {said}"
        ratio = measured.ratio("base", "own")
        assert (ratio.low, ratio.high) == (pytest.approx(ratio.value / times), pytest.approx(ratio.value * times))
    assert Measured.of([like(FAR, FAR, best=CORES, threads=1)] * 15, 15).certain("own")


@pytest.mark.parametrize(("planned_s", "longest_s"), [(0.1, 0.6), (1, 6), (3, 13), (10, 20), (60, 120)])
def test_how_long_rounds_are_taken_again(clock: Clock, planned_s: float, longest_s: float) -> None:
    def take(_: int) -> Round[str]:
        clock.now += planned_s / 10
        return round_of(0.9)

    taken: list[Round[str]] = []
    take_rounds(take, 10, taken)
    assert clock.now == pytest.approx(longest_s, abs=planned_s / 9)


@pytest.mark.parametrize(("until_s", "longest_s"), [(-1, 3), (2, 3), (5, 5), (100, 13)])
def test_rounds_are_not_taken_again_after_a_given_time(clock: Clock, until_s: float, longest_s: float) -> None:
    def take(_: int) -> Round[str]:
        clock.now += 0.3
        return round_of(0.9)

    taken: list[Round[str]] = []
    start = clock.now
    take_rounds(take, 10, taken, until=start + until_s)
    assert clock.now - start == pytest.approx(longest_s, abs=0.31)


@pytest.mark.parametrize(("had", "until_s"), [(10, 5), (14, 5), (40, 5), (40, -1)])
def test_more_rounds_for_those_that_were_disturbed_end_too(clock: Clock, had: int, until_s: float) -> None:
    def take(_: int) -> Round[str]:
        clock.now += 0.3
        assert clock.now - start < 60, "it does not end"
        return round_of(0.9)

    taken = [round_of(0.9)] * had
    start = clock.now
    take_rounds(take, 10, taken, until=start + until_s)
    assert clock.now - start <= max(until_s, 0) + 0.31


@pytest.mark.parametrize("bad", [FAR, SLOW_CORES])
def test_of_rounds_with_a_bad_moment_each_the_median_decides(bad: CoreState) -> None:
    pairs = {CORES: [(CORES, bad), (bad, CORES), (CORES, CORES)], bad: [(bad, bad), (bad, CORES), (CORES, bad)]}
    for most, kinds in pairs.items():
        rounds = [like(*kinds[index % (2 + (index > 10))]) for index in range(15)]
        measured = Measured.of(rounds, 15)
        assert measured.certain("own") == (most == CORES)
        assert len(measured.rounds) == 15
    rounds = [like(bad, CORES)] * 20 + [like(bad, bad)] * 20 + [like(CORES, CORES)] * 3
    measured = Measured.of(rounds, 15)
    assert measured.certain("own")  # the best 15 of them
    assert len(measured.rounds) == 15
    assert [each.cores for each in measured.rounds[-3:]] == [(CORES, CORES)] * 3


def test_a_thread_alone_hands_nothing_over() -> None:
    rounds = [like(CORES, threads=1), like(FAR, threads=1), like(SLOW_CORES, threads=1)]
    assert undisturbed(rounds) == rounds[:2]


def test_figures_are_made_of_the_rounds_at_the_cores_best_and_the_others_are_taken_again(clock: Clock) -> None:
    states = [FAR] * 5 + [CORES] * 4 + [SLOW_CORES] * 2 + [CORES] * 99
    taken: list[Round[str]] = []

    def take(turn: int) -> Round[str]:
        clock.now += 1
        return like(*states[turn : turn + 2])

    with processors(cores=states):
        take_rounds(take, 7, taken)
    assert [each.cores for each in taken] == [(before, after) for before, after in pairwise(states[: len(taken) + 1])]
    assert len(taken) == 15  # at their best in 5 to 7, and from 11 on
    measured = Measured.of(taken, 7)
    assert len(measured.rounds) == 7
    assert measured.certain("own")
    assert measured.cores == CORES
    assert measured.ratio("base", "own").value == pytest.approx(0.252 / 0.028)
    assert taken[0].only(["own"]).cores == taken[0].cores


def test_what_a_measurement_has_seen_the_next_one_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for state in (CORES, FAR):
        monkeypatch.setattr(CoreProbe, "measure", lambda probe, state=state: state)
        taken: list[Round[str]] = []
        take_rounds(lambda _: like(), 1, taken)
        assert len(undisturbed(taken)) == (state == CORES)
        assert taken[0].best == (None if state == CORES else CORES)


def test_the_reason_is_that_of_the_one_that_was_disturbed_most() -> None:
    measured = Measured.of([round_of(0.3)] * 5, 5)
    assert measured.reason("own", "base") == measured.reason("base") == "threads waited for a core in 30% of the time"
    assert measured.cores is None


@pytest.mark.parametrize(
    "waited",
    [
        [0.5] * 15,  # always, the baseline alone
        [0.06, *[0.0] * 3] * 3,  # now and then, the baseline too
        [0.06] * 8 + [0.0] * 4,
    ],
)
def test_there_is_a_reason_where_others_disturbed_most_rounds_and_a_candidate_little(waited: list[float]) -> None:
    measured = Measured.of([round_of(share) for share in waited], LEAST * 4)
    quiet = sum(share == 0 for share in waited)
    assert measured.certain("own") == (quiet >= LEAST)
    assert measured.reason("own") == "other programs ran now and then"
    if 0 < quiet < LEAST:
        assert measured.reason("own", "base")


def test_what_others_use_is_spread_over_the_turns_of_a_round() -> None:
    found = Round({"base": Turn(samples_s=[1.0], use=replace(QUIET, others_s=0.3)), "own": Turn(samples_s=[1.0], use=QUIET)})
    assert found.use("own").others_s == found.use("base").others_s == pytest.approx(0.15)
    whole = together([QUIET, replace(QUIET, others_s=0.5, seconds=3.0)])
    assert (whole.seconds, whole.others_s, whole.step_s) == (4.0, 0.5, pytest.approx(0.01 * 2**0.5))


@pytest.mark.parametrize(
    ("change", "said", "threads"),
    [
        ({"others_s": 0.94}, "other programs used 0.9 of 2 cores", 1),
        (
            {"others_s": 0.94, "waited_s": 0.4},
            "other programs used 0.9 of 2 cores, threads waited for a core in 40% of the time",
            1,
        ),
        ({"others_s": 1.6}, "other programs used 1.6 of 2 cores", None),
        ({"waited_s": 0.2}, "threads waited for a core in 20% of the time", None),
        ({"stolen_s": 0.7}, "a hypervisor's other guests used 0.7 of 2 cores", 1),
        ({"others_s": 3.2, "cores": 8, "threads": 8}, "other programs used 3.2 of 8 cores", 4),
        ({"others_s": None, "waited_s": None}, "what other programs did cannot be measured here", None),
    ],
)
def test_the_reason_and_the_threads_that_leave_the_others_room(change: dict[str, float], said: str, threads: int | None) -> None:
    use = replace(QUIET, **change)  # type: ignore[arg-type]
    assert reason(use) == said
    assert fewer_threads(use) == threads
