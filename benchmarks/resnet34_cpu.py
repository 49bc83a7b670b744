"""ResNet-34 at 224, batches 1 and 8: the best CPU backend in true FP32 against eager. Goal: at least 1.5 times.

    python benchmarks/resnet34_cpu.py [--seconds S]

The weights are random: they do not change the time.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_harness import Goal, bench_table, bullets, conditions_line, exit_status, make_parser, publish

import deploy
from deploy.bench.bench import bench
from deploy.bench.options import BenchOptions

GOAL = 1.5
BATCHES = (1, 8)


def measure(seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        artifact = deploy.export(Path(folder) / "resnet34", arch="resnet34")
        return bench([artifact], BenchOptions(batches=BATCHES, seconds=seconds)).to_json()


def goals(document: Mapping[str, Any]) -> list[Goal]:
    rows = [row for row in document["results"] if row["verdict"] != "baseline"]
    best = [max((row for row in rows if row["batch"] == batch), key=lambda row: row["speedup"]) for batch in BATCHES]
    return [
        Goal(
            text=f"batch {row['batch']}: {row['backend']} {row['speedup']:.2f} times eager (goal: at least {GOAL:g})",
            met=row["speedup"] >= GOAL,
        )
        for row in best
    ]


def report(document: Mapping[str, Any]) -> str:
    title = "# ResNet-34 at 224 in FP32 on the CPU, against eager PyTorch"
    return f"{title}\n\n{bench_table(document)}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="time to spend on measuring (default: %(default)s)")
    options = parser.parse_args()
    document = measure(options.seconds)
    publish("resnet34-cpu", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
