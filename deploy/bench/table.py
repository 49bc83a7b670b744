"""The result of a benchmark as a table for people."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.bench.measure import BenchResult, BenchRow

WIDTH = 100


def print_table(result: BenchResult, file: TextIO) -> None:
    """Write the table, its conditions and what was not run to `file`; in colour only where it is a terminal."""
    console = Console(file=file, highlight=False, width=None if file.isatty() else WIDTH)
    console.print(_table(result))
    conditions = result.conditions
    where = f"{conditions['cpu']}, {conditions['threads']} threads, load average {conditions['load_average'][0]} at the start."
    console.print(where, style="dim", markup=False)
    if conditions["load_average"][0] >= conditions["threads"]:
        console.print("The machine was busy: times and speed-ups may be far off. Run again when it is idle.", style="yellow")
    for name, shape in conditions.get("shapes", {}).items():
        console.print(f"Shape of {name}: {shape}.", style="dim", markup=False)
    console.print("Speed-up: over eager PyTorch in the same rounds, with its 95 % interval.", style="dim")
    console.print("Error: largest difference to eager's outputs.", style="dim")
    for title, entries in (("Not run", result.skipped), ("Failed", result.failures)):
        for entry in entries:
            console.print(f"{title}: {entry.artifact} on {entry.backend}: {entry.reason}", style="yellow", markup=False)


def _table(result: BenchResult) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("artifact", overflow="fold", min_width=8)
    table.add_column("prec.", no_wrap=True)
    table.add_column("backend", overflow="fold", min_width=12)
    for name in ("batch", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    labels = _labels([row.artifact for row in result.results])
    batch = None
    for row in result.results:
        if batch not in (None, row.batch):
            table.add_row()
        batch = row.batch
        table.add_row(escape(labels[row.artifact]), *_cells(row), style="bold" if _best(result, row) else None)
    return table


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path where that tells them apart, else the whole."""
    unique = set(paths)
    names = Counter(Path(path).name for path in unique)
    return {path: Path(path).name if names[Path(path).name] == 1 else path for path in unique}


def _cells(row: BenchRow) -> tuple[str, ...]:
    speed = "1" if row.backend == "eager" else f"{row.speedup:.2f} ({row.speedup_low:.2f}-{row.speedup_high:.2f})"
    error = "not finite" if row.max_abs_error is None else f"{row.max_abs_error:.1e}" if row.max_abs_error else "0"
    times = [_digits(value) for value in (row.p50_ms, row.p90_ms, row.p99_ms)]
    return (row.precision, row.backend, str(row.batch), *times, _digits(row.images_per_s), speed, error)


def _digits(value: float) -> str:
    """Three significant digits, more before the point where there are more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _best(result: BenchResult, row: BenchRow) -> bool:
    """Whether the row has the highest speed-up at its batch size."""
    return row.speedup == max(other.speedup for other in result.results if other.batch == row.batch)
