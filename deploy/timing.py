"""Latencies and what they say: percentiles, throughput, and the ratio of two series measured in alternating rounds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95

Rounds = Sequence[Sequence[float]]
"""Samples of one candidate, round by round; every round has at least one."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Percentiles of one series of samples, in the unit of the samples."""

    p50: float
    p90: float
    p99: float
    mean: float


def latency(samples: Sequence[float]) -> Latency:
    """Percentiles with linear interpolation between samples. Raises ValueError when there are none."""
    if not samples:
        raise ValueError("no samples")
    p50, p90, p99 = (float(value) for value in np.percentile(samples, (50, 90, 99)))
    return Latency(p50=p50, p90=p90, p99=p99, mean=float(np.mean(samples)))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster than the baseline, with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def paired_ratio(baseline: Rounds, candidate: Rounds, *, seed: int = 0) -> Ratio:
    """Speed of `candidate` relative to `baseline`, from rounds in which both ran one after the other.

    With b_r and c_r the medians of round r, the value is median_r(b_r / c_r): what slows a whole round, such as another
    program or a change of clock rate, cancels. Low and high are the percentile bootstrap over rounds (Efron 1979;
    Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3): the 2.5 % and 97.5 % quantiles of that
    median over 2,000 draws of as many rounds with replacement.
    """
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError(f"expected as many rounds of both, and at least one, not {len(baseline)} and {len(candidate)}")
    ratios = np.array([np.median(b) / np.median(c) for b, c in zip(baseline, candidate, strict=True)])
    draws = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(ratios[draws], axis=1), (tail, 1 - tail))
    return Ratio(value=float(np.median(ratios)), low=float(low), high=float(high))


def settle(run: Callable[[], object], *, limit_s: float, window_s: float = 0.05, tolerance: float = 0.05) -> float:
    """Call `run` until its time stops changing; the median seconds of the last window.

    Runs go in windows of `window_s`, one run at least. It has settled when the medians of two windows in a row differ by
    at most `tolerance`, or when `limit_s` is over.
    """
    start = time.perf_counter()
    previous = None
    while True:
        median = float(np.median(sample(run, window_s)))
        if previous is not None and abs(median - previous) <= tolerance * previous:
            return median
        if time.perf_counter() - start >= limit_s:
            return median
        previous = median


def sample(run: Callable[[], object], seconds: float, most: int | None = None) -> list[float]:
    """Seconds of each of the calls of `run` made in `seconds`: one at least, `most` at most."""
    samples: list[float] = []
    clock = time.perf_counter
    start = now = clock()
    while not samples or (now - start < seconds and (most is None or len(samples) < most)):
        before = clock()
        run()
        now = clock()
        samples.append(now - before)
    return samples
