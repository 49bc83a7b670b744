"""Whether `deploy bench` notices other programs: its ratios beside two busy torch processes, against those of a quiet machine.

    python benchmarks/bench_disturbed.py [--runs 20] [--quick]

lenet5 and resnet34 are benchmarked in turns, alone and beside two torch processes that compute and pause at random (seeded). Goals: of
the disturbed runs, every ratio that is called certain lies within 25 % of the quiet one, which is the median of the certain quiet runs;
of the quiet runs, 9 in 10 are certain throughout. --quick tries the script out, and proves nothing.
"""

import functools
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_harness import Goal, bullets, conditions_here, conditions_line, exit_status, make_parser, markdown, publish

import deploy
from deploy.artifact.artifact import Artifact
from deploy.bench import bench as bench_module
from deploy.bench.options import BenchOptions
from deploy.words import count_of

MOST_OFF = 0.25
LEAST_CERTAIN = 0.9
PROGRAMS = 2
BUSY = """
import random, sys, time, torch
chance = random.Random(int(sys.argv[1]))
a = torch.randn(512, 512)
print(flush=True)
while True:
    end = time.monotonic() + chance.uniform(0.2, 3)
    while time.monotonic() < end:
        a = torch.tanh(a @ a)
    time.sleep(chance.uniform(0.2, 3))
"""
"""A program that computes and pauses; its argument is the seed."""


@dataclass(frozen=True, kw_only=True)
class Net:
    """What is benchmarked, and for how many seconds."""

    arch: str
    seconds: float


NETS = (Net(arch="lenet5", seconds=1.0), Net(arch="resnet34", seconds=2.0))
QUICK = tuple(Net(arch=net.arch, seconds=0.4) for net in NETS)


@contextmanager
def busy(seed: int) -> Iterator[None]:
    """Two programs that compute and pause beside the block."""
    programs = [
        subprocess.Popen([sys.executable, "-c", BUSY, str(PROGRAMS * seed + index)], stdout=subprocess.PIPE)
        for index in range(PROGRAMS)
    ]
    try:
        for program in programs:
            assert program.stdout is not None
            program.stdout.readline()
        yield
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def ratios(artifact: Artifact, seconds: float) -> list[dict[str, Any]]:
    """What `deploy bench` says of ONNX Runtime against eager PyTorch at batch 1."""
    found = bench_module.bench([artifact], BenchOptions(backends=("onnxruntime",), batches=(1,), seconds=seconds))
    kept = (
        "backend",
        "p50_ms",
        "speedup",
        "speedup_low",
        "speedup_high",
        "certain",
        "uncertain_because",
        "others_cores",
        "waited_share",
        "step_ns",
        "handoff_us",
    )
    return [
        {**{key: getattr(row, key) for key in kept}, "repeated_rounds": found.conditions["disturbance"]["repeated_rounds"]}
        for row in found.results
        if row.verdict != "baseline"
    ]


def measure(runs: int, nets: Sequence[Net]) -> list[dict[str, Any]]:
    """Quiet and disturbed runs, in turns."""
    bench_module.measure_peak = functools.cache(bench_module.measure_peak)  # two seconds of every run, which are of no use here
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {net: deploy.export(Path(folder, net.arch), arch=net.arch) for net in nets}
        for run in range(runs):
            quiet = [(net, row) for net, artifact in artifacts.items() for row in ratios(artifact, net.seconds)]
            with busy(run):
                beside = [(net, row) for net, artifact in artifacts.items() for row in ratios(artifact, net.seconds)]
            for disturbed, rows in ((False, quiet), (True, beside)):
                measured += [{"run": run, "disturbed": disturbed, "net": net.arch, **row} for net, row in rows]
            print(f"run {run + 1} of {runs}", file=sys.stderr, flush=True)
    return measured


def off(document: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """How far a ratio is from the quiet one, as a share of it; infinitely if no quiet run of that net is certain."""
    quiet = [
        other["speedup"]
        for other in document["runs"]
        if other["net"] == row["net"] and not other["disturbed"] and other["certain"]
    ]
    return abs(row["speedup"] / float(np.median(quiet)) - 1) if quiet else math.inf


def goals(document: Mapping[str, Any]) -> list[Goal]:
    rows = document["runs"]
    certain = [row for row in rows if row["disturbed"] and row["certain"]]
    worst = max((off(document, row) for row in certain), default=0.0)
    farthest = f"the farthest of which is {worst:.0%} off the quiet one" if certain else "so that none can be wrong"
    runs = {row["run"] for row in rows}
    throughout = sum(all(row["certain"] for row in rows if row["run"] == run and not row["disturbed"]) for run in runs)
    least = math.ceil(LEAST_CERTAIN * len(runs))
    return [
        Goal(
            text=f"of {count_of(sum(row['disturbed'] for row in rows), 'disturbed ratio')}, {len(certain)} are called certain,"
            f" {farthest} (goal: at most {MOST_OFF:.0%})",
            met=worst <= MOST_OFF,
        ),
        Goal(
            text=f"of {count_of(len(runs), 'quiet run')}, {throughout} are certain throughout (goal: at least {least})",
            met=throughout >= least,
        ),
    ]


def kind(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row's net and circumstances, and what it is called."""
    where = "beside two busy processes" if row["disturbed"] else "quiet"
    return f"{row['net']}, {where}", "certain" if row["certain"] else "uncertain"


def report(document: Mapping[str, Any]) -> str:
    table = []
    for found in sorted({kind(row) for row in document["runs"]}):
        ratios = [row["speedup"] for row in document["runs"] if kind(row) == found]
        table.append([*found, str(len(ratios)), f"{min(ratios):.2f} to {max(ratios):.2f}"])
    head = ["ONNX Runtime over eager, batch 1", "called", "ratios", "from"]
    return (
        f"# `deploy bench` beside other programs\n\n{markdown(head, table)}\n{bullets(goals(document))}\n"
        f"{conditions_line(document['conditions'])}"
    )


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=20, help="quiet and disturbed runs of each net (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two runs, half a second each")
    options = parser.parse_args()
    runs, nets = (2, QUICK) if options.quick else (options.runs, NETS)
    where = conditions_here()
    document = {"conditions": where, "runs": measure(runs, nets)}
    publish("bench-disturbed", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
