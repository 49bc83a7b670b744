"""ResNet-34 at 224, batches 1 and 8: the best CPU backend in true FP32 against eager. Goal: at least 1.5 times.

    python benchmarks/resnet34_cpu.py [--seconds S] [--out FILE.json]

The weights are random: they do not change the time.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import deploy
from deploy.bench.bench import bench
from deploy.bench.plan import BenchOptions
from deploy.bench.report.table import print_table

GOAL = 1.5
BATCHES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="time to spend on measuring (default %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact = deploy.export(Path(folder) / "resnet34", arch="resnet34")
        result = bench([artifact], BenchOptions(batches=BATCHES, seconds=arguments.seconds))
    print_table(result, sys.stdout)
    for batch in BATCHES:
        rows = [row for row in result.results if row.batch == batch and row.backend != "eager"]
        best = max(rows, key=lambda row: row.speedup)
        verdict = "met" if best.speedup >= GOAL else "NOT met"
        print(f"batch {batch}: {best.backend} {best.speedup:.2f} times eager (goal: at least {GOAL}): {verdict}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result.to_json()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
