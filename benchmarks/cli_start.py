"""How long `deploy --help` takes, against starting Python and importing click. Goal: at most 1.5 times.

    python benchmarks/cli_start.py [--runs 30]

The two take turns, each as a fresh process; the ratio is that of the medians.
"""

import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_harness import (
    Goal,
    bullets,
    conditions_here,
    conditions_line,
    exit_status,
    in_turns,
    make_parser,
    markdown,
    publish,
    seconds_of,
)

GOAL = 1.5
OURS, BARE = "deploy --help", "import click"


def measure(runs: int) -> dict[str, list[float]]:
    """Seconds of every run, by command."""
    script = shutil.which("deploy", path=str(Path(sys.executable).parent))
    if script is None:
        sys.exit("the command `deploy` is not beside this Python: install the package first")

    def start(command: list[str]) -> float:
        return seconds_of(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))

    sides = {OURS: lambda: start([script, "--help"]), BARE: lambda: start([sys.executable, "-c", "import click"])}
    return in_turns(sides, runs, warm_up=2)  # which fills the caches of the disk


def goals(document: Mapping[str, Any]) -> list[Goal]:
    medians = {name: statistics.median(values) for name, values in document["seconds"].items()}
    ratio = medians[OURS] / medians[BARE]
    return [Goal(text=f"`{OURS}` takes {ratio:.2f} times as long as `{BARE}` (goal: at most {GOAL:g})", met=ratio <= GOAL)]


def report(document: Mapping[str, Any]) -> str:
    rows = [[name, f"{statistics.median(values) * 1e3:.1f} ms"] for name, values in document["seconds"].items()]
    table = markdown(["", "median"], rows)
    return f"# Start of the command line\n\n{table}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=30, help="runs of each (default: %(default)s)")
    options = parser.parse_args()
    document = {"conditions": conditions_here(), "seconds": measure(options.runs)}
    publish("cli-start", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
