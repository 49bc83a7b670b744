"""Whether the benchmark itself can be believed: what it adds to a sample, and whether it finds a slowdown of 5 %.

    python benchmarks/harness.py [--trials 100]

What it adds: the median sample of a null session less what one of its runs takes in a row of many (goal: at most 1 µs).
Slowdowns: busy waits of 1.00 and 1.05 ms take turns in as many rounds as `deploy bench` has, again and again; the interval of
their ratio, at 99 %, must leave 1 out in at least 95 of 100 trials; with equal waits it must hold 1 in as many.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
from common import verdict

import deploy
from deploy.bench.candidate.inputs import make_feeds
from deploy.bench.rows import verdict_of
from deploy.bench.run import ROUNDS
from deploy.evidence.timing import paired_ratio, sample

GOAL_US = 1.0
GOAL_SHARE = 0.95
CONFIDENCE = 0.99
SLICE_S = 0.008


def overhead_us(folder: Path) -> float:
    artifact = deploy.export(folder / "lenet5", arch="lenet5")
    with deploy.load(artifact, "null") as session:
        step = cycle(make_feeds(artifact, session.inputs, {"batch": 1}, None)).__next__
        found = []
        for _ in range(20):
            measured = np.median(sample(lambda: session.run(step()), 0.05))
            start = time.perf_counter()
            for _ in range(5000):
                session.run(step())
            found.append(measured - (time.perf_counter() - start) / 5000)
    return float(np.median(found)) * 1e6


def wait(ms: float) -> Callable[[], None]:
    def run() -> None:
        end = time.perf_counter() + ms / 1e3
        while time.perf_counter() < end:
            pass

    return run


def trial(first: Callable[[], None], second: Callable[[], None], seed: int) -> str:
    """What is said of the second against the first."""
    rounds: tuple[list[list[float]], list[list[float]]] = ([], [])
    runs = [(first, rounds[0]), (second, rounds[1])]
    for turn in range(ROUNDS):
        for run, found in runs if turn % 2 else reversed(runs):
            found.append(sample(run, SLICE_S))
    return verdict_of(paired_ratio(*rounds, seed=seed, confidence=CONFIDENCE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="of each of the two (default %(default)s)")
    count = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as folder:
        added = overhead_us(Path(folder))
    slower = sum(trial(wait(1.0), wait(1.05), seed) == "slower" for seed in range(count)) / count
    equal = sum(trial(wait(1.0), wait(1.0), seed) == "no difference" for seed in range(count)) / count
    results = [
        (f"the harness adds {added:.2f} µs to a sample (goal: at most {GOAL_US:g})", added <= GOAL_US),
        (
            f"1.05 ms is found slower than 1.00 ms in {slower:.0%} of {count} trials (goal: {GOAL_SHARE:.0%})",
            slower >= GOAL_SHARE,
        ),
        (
            f"1.00 ms is found no different from 1.00 ms in {equal:.0%} of {count} trials (goal: {GOAL_SHARE:.0%})",
            equal >= GOAL_SHARE,
        ),
    ]
    for text, met in results:
        print(verdict(text, met))
    if not all(met for _, met in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
