"""Whether `deploy bench` itself can be believed: what it adds to a sample, and whether it notices a slowdown of 5 %.

    python benchmarks/bench_itself.py [--trials 100]

Overhead: the median sample of a null session, less the time of one of many runs in a row (goal: at most 1 µs).
Slowdowns: busy waits of 1.00 and 1.05 ms take turns in as many rounds as `deploy bench` has. In at least 95 of 100 trials
the 99 % interval of their ratio must leave out 1; with two waits of 1.00 ms it must contain 1 as often.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from bench_harness import Goal, bullets, conditions_here, conditions_line, exit_status, in_turns, make_parser, publish

import deploy
from deploy.bench.candidate.inputs import make_feeds
from deploy.bench.rows import verdict_of
from deploy.bench.run import ROUNDS
from deploy.evidence.timing import paired_ratio, sample
from deploy.words import count_of

GOAL_US = 1.0
GOAL_SHARE = 0.95
CONFIDENCE = 0.99
SLICE_S = 0.008


def overhead_us(folder: Path) -> float:
    """Microseconds that timing one run adds to it."""
    artifact = deploy.export(folder / "lenet5", arch="lenet5")
    with deploy.load(artifact, "null") as session:
        step = cycle(make_feeds(artifact, session.inputs, {"batch": 1}, None)).__next__
        added = []
        for _ in range(20):
            measured = np.median(sample(lambda: session.run(step()), 0.05))
            start = time.perf_counter()
            for _ in range(5000):
                session.run(step())
            added.append(measured - (time.perf_counter() - start) / 5000)
    return float(np.median(added)) * 1e6


def wait(ms: float) -> Callable[[], None]:
    def run() -> None:
        end = time.perf_counter() + ms / 1e3
        while time.perf_counter() < end:
            pass

    return run


def trial(first: Callable[[], None], second: Callable[[], None], seed: int) -> str:
    """The verdict on the second against the first."""
    rounds = in_turns({"first": lambda: sample(first, SLICE_S), "second": lambda: sample(second, SLICE_S)}, ROUNDS)
    return verdict_of(paired_ratio(rounds["first"], rounds["second"], seed=seed, confidence=CONFIDENCE))


def measure(trials: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        added = overhead_us(Path(folder))
    slower = sum(trial(wait(1.0), wait(1.05), seed) == "slower" for seed in range(trials)) / trials
    equal = sum(trial(wait(1.0), wait(1.0), seed) == "no difference" for seed in range(trials)) / trials
    return {"trials": trials, "overhead_us": added, "slower_share": slower, "equal_share": equal}


def goals(document: Mapping[str, Any]) -> list[Goal]:
    added, slower, equal = document["overhead_us"], document["slower_share"], document["equal_share"]
    trials = f"of {count_of(document['trials'], 'trial')} (goal: {GOAL_SHARE:.0%})"
    return [
        Goal(text=f"timing adds {added:.2f} µs to a sample (goal: at most {GOAL_US:g})", met=added <= GOAL_US),
        Goal(text=f"1.05 ms is called slower than 1.00 ms in {slower:.0%} {trials}", met=slower >= GOAL_SHARE),
        Goal(text=f"1.00 ms is called no different from 1.00 ms in {equal:.0%} {trials}", met=equal >= GOAL_SHARE),
    ]


def report(document: Mapping[str, Any]) -> str:
    return f"# What `deploy bench` adds and notices\n\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--trials", type=int, default=100, help="trials of each of the two pairs (default: %(default)s)")
    options = parser.parse_args()
    document = {"conditions": conditions_here(), **measure(options.trials)}
    publish("bench-itself", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
