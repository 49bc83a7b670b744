"""Timing: samples, their percentiles, and the ratio of two series that were measured in alternating rounds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95

Rounds = Sequence[Sequence[float]]
"""Samples of one candidate, round by round; every round has at least one sample."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Percentiles of one series of samples, in the unit of the samples."""

    p50: float
    p90: float
    p99: float
    p999: float
    mean: float


def latency(samples: Sequence[float]) -> Latency:
    """Percentiles with linear interpolation between samples. Raises ValueError when there are none."""
    if not samples:
        raise ValueError("no samples")
    p50, p90, p99, p999 = (float(value) for value in np.percentile(samples, (50, 90, 99, 99.9)))
    return Latency(p50=p50, p90=p90, p99=p99, p999=p999, mean=float(np.mean(samples)))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast as the baseline, with the ends of its confidence interval (95 % by default)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """A ratio of two medians, and its values in RESAMPLES random draws of rounds, (RESAMPLES,)."""

    value: float
    draws: np.ndarray


def paired_ratio(baseline: Rounds, candidate: Rounds, *, seed: int = 0, confidence: float = CONFIDENCE) -> Ratio:
    """Speed of `candidate` relative to `baseline`, from rounds in which both ran one after the other.

    The value is the median of all samples of the baseline over that of the candidate: the ratio of the two p50. Low and
    high are the percentile bootstrap (Efron 1979; Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section
    13.3): the quantiles of that ratio, over 2,000 draws of as many rounds with replacement, that hold `confidence` between them.
    Whole rounds are drawn, the same for both: samples of one round are not independent, and what slows a round slows both.
    """
    ratio = bootstrap(baseline, candidate, seed=seed)
    return interval(ratio.value, ratio.draws, confidence)


def bootstrap(baseline: Rounds, candidate: Rounds, *, seed: int = 0) -> Bootstrap:
    """The ratio of `paired_ratio` and its draws. Raises ValueError unless both have the same number of rounds, at least one."""
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError(f"expected as many rounds of both, and at least one, not {len(baseline)} and {len(candidate)}")
    count = len(baseline)
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES)
    value = np.median(np.concatenate([*baseline])) / np.median(np.concatenate([*candidate]))
    return Bootstrap(value=float(value), draws=_medians(baseline, draws) / _medians(candidate, draws))


def interval(value: float, draws: np.ndarray, confidence: float = CONFIDENCE) -> Ratio:
    """The value with the ends of the interval that holds `confidence` of its draws."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    return Ratio(value=value, low=min(float(low), value), high=max(float(high), value))


def _medians(rounds: Rounds, draws: np.ndarray) -> np.ndarray:
    """The median of all samples for each row of `draws`, which holds how often each round is counted."""
    owners = np.repeat(np.arange(len(rounds)), [len(samples) for samples in rounds])
    values = np.concatenate([*rounds])
    order = np.argsort(values)
    values, owners = values[order], owners[order]
    return np.array([values[np.searchsorted(total := np.cumsum(draw[owners]), (total[-1] + 1) // 2)] for draw in draws])


def settle(
    run: Callable[[], object], *, limit_s: float, window_s: float = 0.05, tolerance: float = 0.05, first_s: float | None = None
) -> float:
    """Call `run` until its time stops changing; returns the median seconds of the last window.

    Runs are grouped in windows of `window_s`, with at least one run. The time has settled when the medians of two windows in a
    row differ by at most `tolerance`, or after `limit_s`. first_s: seconds of an earlier run, a window if it was long enough.
    """
    start = time.perf_counter()
    previous = first_s if first_s is not None and first_s >= window_s else None
    while True:
        median = float(np.median(sample(run, window_s)))
        if previous is not None and abs(median - previous) <= tolerance * previous:
            return median
        if time.perf_counter() - start >= limit_s:
            return median
        previous = median


def sample(run: Callable[[], object], seconds: float, most: int | None = None) -> list[float]:
    """Call `run` for `seconds`, at least once and at most `most` times; returns the seconds of each call."""
    samples: list[float] = []
    clock = time.perf_counter
    start = now = clock()
    while not samples or (now - start < seconds and (most is None or len(samples) < most)):
        before = clock()
        run()
        now = clock()
        samples.append(now - before)
    return samples
