"""What the INT8 benchmarks share: the peers' environment, processes that are timed or weighed, images, dated results."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deploy.calibration.imagefolder import Sample

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
SAMPLE_S = 0.05
"""Time between two looks at the memory of a process tree."""


def add_peers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", type=Path, default=PEERS, metavar="PYTHON", help="of `make peers` (default: %(default)s)")


def check_peers(python: Path) -> Path:
    if not python.exists():
        sys.exit(f"no Python at {python}: run `make peers`, or name the interpreter of the peers' environment with --peers")
    return python.absolute()  # not resolved: a virtual environment is known by the link


def peer_command(
    python: Path, tool: str, model: Path, samples: Sequence[Sample], preprocess: Mapping[str, Any], out: Path
) -> list[str]:
    """The command that quantizes `model` with `tool`; writes the list of images and the preprocessing beside `out`."""
    files, settings = out.with_suffix(".txt"), out.with_suffix(".json")
    files.write_text("".join(f"{path.absolute()}\n" for path, _ in samples), encoding="utf-8")
    settings.write_text(json.dumps(preprocess), encoding="utf-8")
    script = HERE / "peers" / "quantize.py"
    return [str(python), str(script), tool, str(model), str(files), str(out), "--preprocess", str(settings)]


def our_command(artifact: Path, calib: Path, images: int, out: Path, *options: str) -> list[str]:
    """`deploy quantize` of this environment."""
    command = [sys.executable, "-m", "deploy", "quantize", str(artifact), "--calib", str(calib), "--images", str(images)]
    return [*command, *options, "-o", str(out)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A process that has ended: exit status, wall seconds, and the peak of the PSS summed over its tree (bytes; None: not weighed)."""

    status: int
    seconds: float
    peak: int | None
    output: str


def run(command: Sequence[str], cache: Path, *, weigh: bool = False, may_fail: bool = False) -> Run:
    """Run `command` with `cache` for its cache folder. Weighing takes time of its own: do not compare such seconds.

    Exits with what the command printed when it fails, unless `may_fail`.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    peak = 0
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(SAMPLE_S):
            peak = max(peak, sum(map(pss, tree(process.pid))))

    watcher = threading.Thread(target=watch)
    if weigh:
        watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    over.set()
    if weigh:
        watcher.join()
    if process.returncode != 0 and not may_fail:
        sys.exit(f"{' '.join(command)} failed:\n{output}")
    return Run(status=process.returncode, seconds=seconds, peak=peak if weigh else None, output=output)


def tree(pid: int) -> list[int]:
    """`pid` and all processes that descend from it."""
    found = [pid]
    for parent in found:  # grows
        try:
            threads = list(Path(f"/proc/{parent}/task").iterdir())
            found += [int(child) for thread in threads for child in (thread / "children").read_text().split()]
        except OSError:
            continue  # it has ended
    return found


def pss(pid: int) -> int:
    """Proportional set size in bytes; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def make_photos(folder: Path, count: int) -> None:
    """`count` JPEGs of 500 x 375 pixels of smooth colours with noise, in ten classes: for time, not for accuracy."""
    rng = np.random.default_rng(0)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = pixels + rng.normal(0, 12, pixels.shape).astype(np.int16)
        path = folder / str(index % 10) / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns but the first are set to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [header, rule, *rows]
    cells = [
        [cell.ljust(width) if not at else cell.rjust(width) for at, (cell, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def write_results(name: str, document: Mapping[str, Any], text: str) -> None:
    """`document` and `text` as benchmarks/results/<date>-<name>.json and .md; a run of the same day is replaced."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{name}"
    (RESULTS / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{stem}.md").write_text(text, encoding="utf-8")
    print(f"written: {RESULTS / stem}.json and .md")


def verdict(text: str, met: bool) -> str:
    """A line of figures against a goal."""
    return f"{text}: {'met' if met else 'NOT met'}"
