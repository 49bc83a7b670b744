"""How long `deploy --help` takes, against starting Python and importing click.

    python benchmarks/cli_start.py [--runs 30]

The two alternate, each as a fresh process; the ratio is of the medians. Goal: at most 1.5.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

GOAL = 1.5


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="runs of each (default 30)")
    runs = parser.parse_args().runs
    script = shutil.which("deploy", path=str(Path(sys.executable).parent))
    if script is None:
        sys.exit("the command `deploy` is not beside this Python: install the package first")
    commands = {"deploy --help": [script, "--help"], "import click": [sys.executable, "-c", "import click"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs + 2):
        for name, command in commands.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}  # the first two fill the caches
    for name, median in medians.items():
        print(f"{name:<14} {median * 1e3:7.1f} ms")
    ratio = medians["deploy --help"] / medians["import click"]
    print(f"ratio          {ratio:7.2f}    (goal: at most {GOAL})")
    sys.exit(ratio > GOAL)


if __name__ == "__main__":
    main()
