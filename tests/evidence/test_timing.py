import time

import numpy as np
import pytest

from deploy.evidence.timing import latency, paired_ratio, sample, settle


def test_percentiles_interpolate_between_samples() -> None:
    found = latency([float(value) for value in range(101)])
    assert (found.p50, found.p90, found.p99, found.mean) == (50, 90, 99, 50)


def test_no_samples_have_no_latency() -> None:
    with pytest.raises(ValueError, match="no samples"):
        latency([])


def test_the_ratio_is_that_of_the_two_p50() -> None:
    baseline = [[2.0, 2.0, 9.0], [2.0, 4.0], [50.0]]
    candidate = [[1.0, 1.0], [1.0], [30.0, 1.0]]
    ratio = paired_ratio(baseline, candidate)
    assert ratio.value == latency([2, 2, 9, 2, 4, 50]).p50 / latency([1, 1, 1, 30, 1]).p50 == 3
    assert ratio.low <= 2 < 3 <= ratio.high


def test_a_round_that_is_slow_for_both_widens_nothing() -> None:
    rounds = [[1.0, 1.0]] * 9 + [[10.0, 10.0]]
    slower = [[2 * value for value in samples] for samples in rounds]
    ratio = paired_ratio(slower, rounds)
    assert (ratio.value, ratio.low, ratio.high) == (2, 2, 2)


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        baseline = [[value] for value in 3 * rng.lognormal(0, 0.1, 15)]
        candidate = [[value] for value in rng.lognormal(0, 0.1, 15)]
        ratio = paired_ratio(baseline, candidate, seed=seed)
        assert ratio.low <= ratio.value <= ratio.high
        hits += ratio.low <= 3 <= ratio.high
    assert 0.88 <= hits / 200 <= 0.995


@pytest.mark.parametrize(("baseline", "candidate"), [([], []), ([[1.0]], [[1.0], [1.0]])])
def test_rounds_that_do_not_pair_are_refused(baseline: list[list[float]], candidate: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="as many rounds of both"):
        paired_ratio(baseline, candidate)


def test_sampling_stops_at_the_time_or_at_the_most_and_takes_one_at_least() -> None:
    assert len(sample(lambda: time.sleep(0.02), 0.001)) == 1
    assert len(sample(lambda: None, 10.0, 7)) == 7
    assert 2 <= len(sample(lambda: time.sleep(0.01), 0.05)) <= 6


def test_samples_are_the_seconds_of_a_run() -> None:
    (value,) = sample(lambda: time.sleep(0.02), 0.001)
    assert 0.02 <= value < 0.5


def test_settling_waits_for_slow_first_runs() -> None:
    pauses = iter([0.08, 0.04, 0.02] + [0.005] * 1000)
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1
        time.sleep(next(pauses))

    assert settle(run, limit_s=5.0, tolerance=0.5) < 0.02
    assert runs > 10


def test_settling_gives_up_at_the_limit() -> None:
    pauses = iter(0.002 * 2**turn for turn in range(20))
    start = time.perf_counter()
    settle(lambda: time.sleep(next(pauses)), limit_s=0.1, window_s=0.001)
    assert time.perf_counter() - start < 2


def test_a_long_run_before_counts_as_a_window() -> None:
    runs = []
    found = settle(lambda: (runs.append(1), time.sleep(0.06)), limit_s=5, first_s=0.061, tolerance=0.2)
    assert len(runs) == 1
    assert found == pytest.approx(0.06, rel=0.2)
    runs.clear()
    settle(lambda: (runs.append(1), time.sleep(0.06)), limit_s=5, first_s=0.5, tolerance=0.2)  # which the next belies
    assert len(runs) == 2
    runs.clear()
    settle(lambda: (runs.append(1), time.sleep(0.02)), limit_s=5, first_s=0.02, tolerance=0.5)  # too short to be one
    assert len(runs) >= 4
