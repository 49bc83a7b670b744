"""The harness of all benchmarks: arguments, turns, processes that are timed or weighed, tables, goals and dated results."""

import argparse
import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the deploy of this checkout, installed or not

from deploy.bench.conditions import conditions
from deploy.calibration.imagefolder import Sample
from deploy.host.core_probe import CoreProbe, best_known, best_of, remember
from deploy.host.cpu import usable_cores
from deploy.words import count_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
AGAIN = 4
"""How many times as many rounds as planned are taken at most, where those are wanted at which the cores are at their best."""
MOST_BYTES = 200_000
"""Largest file of results."""
SAMPLE_S = 0.05
"""Time between two readings of the memory of a process tree."""

T = TypeVar("T")


# Arguments


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a script: its docstring as help, and the options that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    return parser


def add_photos(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photos", type=Path, metavar="IMAGEFOLDER", help="photographs (default: images are made)")


def add_peers(parser: argparse.ArgumentParser, target: str = "peers") -> None:
    """`--peers`, the interpreter of the environment that `make TARGET` makes."""
    default = HERE.parent / f".venv-{target}" / "bin" / "python"
    parser.add_argument(
        "--peers", type=Path, default=default, metavar="PYTHON", help=f"of `make {target}` (default: %(default)s)"
    )


def add_add(parser: argparse.ArgumentParser) -> None:
    """The option of benchmarks that take hours, to be measured in parts: see `earlier`."""
    parser.add_argument("--add", action="store_true", help="keep the results of today, and add to them")


def check_peers(python: Path, target: str = "peers") -> Path:
    """The absolute path of the peers' interpreter. Exits if there is none."""
    if not python.exists():
        sys.exit(f"no Python at {python}: run `make {target}`, or name the interpreter of the peers' environment with --peers")
    return python.absolute()  # not resolved: the link is what makes it the interpreter of its environment


# Turns


def in_turns(sides: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: int = 0, steady: bool = False) -> dict[str, list[T]]:
    """What each side returns in each round. The order rotates, so that no side always follows the same one.

    warm_up: rounds before those that count. steady: take rounds again in which a hypervisor held the cores back.
    """
    names = list(sides)

    def take(turn: int) -> dict[str, T]:
        shift = turn % len(names)
        return {name: sides[name]() for name in names[shift:] + names[:shift]}

    for turn in range(warm_up):
        take(turn)
    taken = _steady(take, warm_up, rounds) if steady else [take(warm_up + turn) for turn in range(rounds)]
    return {name: [each[name] for each in taken] for name in names}


def _steady(take: Callable[[int], T], turn: int, rounds: int) -> list[T]:
    """Rounds at whose ends the cores were at their best (`deploy.host.core_probe`), of `AGAIN` times as many at most; others where those are too few."""
    good: list[T] = []
    bad: list[T] = []
    with CoreProbe() as probe:
        before = probe.measure()
        while len(good) < rounds and len(good) + len(bad) < AGAIN * rounds:
            each = take(turn + len(good) + len(bad))
            after = probe.measure()
            states = [state for state in (before, after) if state is not None]
            if (found := best_of(states)) is not None:
                remember(found)
            best = best_known()
            (bad if best is not None and any(state.is_below(best, 2) for state in states) else good).append(each)
            before = after
    if bad:
        print(f"a hypervisor held the cores back in {len(bad)} of {count_of(len(good) + len(bad), 'round')}", file=sys.stderr)
    return (good + bad)[:rounds]


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that one call of `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# Processes


@dataclass(frozen=True, kw_only=True)
class Run:
    """A process that has ended: exit status, wall seconds, and the peak of the PSS summed over its tree (bytes; None: not weighed)."""

    status: int
    seconds: float
    peak: int | None
    output: str


def run(command: Sequence[str], cache: Path, *, weigh: bool = False, may_fail: bool = False) -> Run:
    """Run `command` with `cache` as its cache folder. Weighing takes time itself: do not compare the seconds of weighed runs.

    Exits with the output of the command when it fails, unless `may_fail`.
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
    pids = [pid]
    for parent in pids:  # grows
        try:
            threads = list(Path(f"/proc/{parent}/task").iterdir())
            pids += [int(child) for thread in threads for child in (thread / "children").read_text().split()]
        except OSError:
            continue  # it has ended
    return pids


def pss(pid: int) -> int:
    """Proportional set size in bytes; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


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


# Images


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


# Reports


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure beside its goal, in words, and whether the goal is met."""

    text: str
    met: bool

    def __str__(self) -> str:
        return f"{self.text}: {'met' if self.met else 'NOT met'}"


def exit_status(goals: Iterable[Goal]) -> int:
    """0 if all goals are met, else 1."""
    return 0 if all(goal.met for goal in goals) else 1


def bullets(lines: Iterable[object]) -> str:
    """A Markdown list."""
    return "".join(f"- {line}\n" for line in lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [header, rule, *rows]
    cells = [
        [cell.ljust(width) if not at else cell.rjust(width) for at, (cell, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def bench_table(document: Mapping[str, Any]) -> str:
    """The latencies and speed-ups of a document of `deploy bench --json`."""
    rows = []
    for row in document["results"]:
        speed = f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
        times = [f"{row['p50_ms']:.1f} ms", f"{row['p99_ms']:.1f} ms"]
        rows.append([f"{row['backend']}, {row['precision']}", str(row["batch"]), *times, speed])
    return markdown(["", "batch", "p50", "p99", f"times {document.get('baseline', 'eager')}"], rows)


def conditions_here(device: str = "cpu") -> dict[str, Any]:
    """The conditions of a measurement that starts now, with all usable cores."""
    return conditions(threads=usable_cores(), device=device)


def conditions_line(measured: Mapping[str, Any]) -> str:
    """The conditions of a document in one line: the processor, threads, load, versions of what is installed, time."""
    threads = count_of(measured["threads"], "thread") if "threads" in measured else count_of(measured["cores"], "core")
    busy = f", load average {measured['load_average'][0]} before" if "load_average" in measured else ""
    parts = [f"{measured['cpu']}, {threads}{busy}", shown_versions(measured.get("versions", {})), measured.get("time", "")]
    return "; ".join(part for part in parts if part) + ".\n"


def shown_versions(versions: Mapping[str, str | None]) -> str:
    """`python 3.11.7, torch 2.14.1`: only what is installed."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


# Results


def publish(name: str, document: Mapping[str, Any], text: str, folder: Path = RESULTS) -> None:
    """Print `text`, and `save` it and `document`."""
    print(text)
    print(f"written: {save(name, document, text, folder)}.json and .md")


def save(name: str, document: Mapping[str, Any], text: str, folder: Path) -> Path:
    """Write `text` and `document` as FOLDER/<date>-<name>.md and .json, and return FOLDER/<date>-<name>.

    A run of the same day is replaced. Raises ValueError if `document` is too large.
    """
    content = encode(document)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{datetime.now(UTC):%Y-%m-%d}-{name}"
    Path(f"{stem}.json").write_text(content, encoding="utf-8")
    Path(f"{stem}.md").write_text(text, encoding="utf-8")
    return stem


def earlier(name: str, folder: Path) -> dict[str, Any] | None:
    """The document that was saved today; None if there is none."""
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}-{name}.json"
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def encode(document: Mapping[str, Any]) -> str:
    """`document` as JSON of at most MOST_BYTES: where it is larger, raw samples (`samples_ms`) are thinned until it fits.

    Nothing else is left out; a thinned document has a note, `thinned`. Raises ValueError if it does not fit even then.
    """
    every = 1
    while every <= 4096:
        content = dumps(document if every == 1 else {**thin(document, every), "thinned": f"1 of {every} samples_ms is kept"})
        if len(content.encode()) <= MOST_BYTES:
            return content
        every *= 2
    raise ValueError(f"results of {len(content):,} bytes; at most {MOST_BYTES:,} are kept: pack or leave out what no table needs")


def dumps(document: Mapping[str, Any]) -> str:
    """Indented JSON, each list of numbers on one line."""
    text = json.dumps(document, indent=1)
    return (
        re.sub(r'\[\n[^\[\]{}"]*\]', lambda numbers: " ".join(numbers[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
        + "\n"
    )


def thin(value: Any, every: int) -> Any:
    """`value` with one of `every` samples of each `samples_ms` in it, round by round; `rounds` beside it is adjusted."""
    if isinstance(value, list):
        return [thin(part, every) for part in value]
    if not isinstance(value, dict):
        return value
    thinned = {key: thin(part, every) for key, part in value.items() if key != "samples_ms"}
    if "samples_ms" not in value:
        return thinned
    samples = value["samples_ms"]
    if isinstance(samples, dict):  # label -> rounds
        thinned["samples_ms"] = {label: [_quantiles(part, every) for part in rounds] for label, rounds in samples.items()}
        return thinned
    ends = np.cumsum(value.get("rounds", [len(samples)]))
    starts = [0, *ends[:-1]]
    rounds = [_quantiles(samples[start:end], every) for start, end in zip(starts, ends, strict=True)]
    thinned["samples_ms"] = [sample for part in rounds for sample in part]
    if "rounds" in value:
        thinned["rounds"] = [len(part) for part in rounds]
    return {key: thinned[key] for key in value}  # in the order of before


def _quantiles(samples: Sequence[float], every: int) -> list[float]:
    """One of `every` samples, at least one, evenly spaced in their order by size: their median and spread stay."""
    kept = max(1, len(samples) // every)
    ordered = sorted(samples)
    return [ordered[(2 * index + 1) * len(ordered) // (2 * kept)] for index in range(kept)]


def pack(flags: np.ndarray) -> str:
    """A bool array, one flag for each image, as text of a few bytes for each flag that is set: zlib, then Base64."""
    return base64.b64encode(zlib.compress(np.packbits(flags).tobytes(), 9)).decode("ascii")


def unpack(text: str, count: int) -> np.ndarray:
    """The (count,) bool array that `pack` wrote."""
    return np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8), count=count).astype(bool)
