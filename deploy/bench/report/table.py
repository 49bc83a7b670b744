"""The result of a benchmark as tables in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.artifact.summary import points_text
from deploy.bench.report.certainty import distance, gaps, warnings
from deploy.bench.report.compare import Comparison
from deploy.bench.report.labels import baseline_name, digits, metric_name, short_names
from deploy.bench.rows import UNCERTAIN, BenchResult, BenchRow, LayersRow
from deploy.runtime.layers import shares
from deploy.words import count_of

WIDTH = 100
TOP = 10
"""Number of layers shown for each candidate."""


def print_table(result: BenchResult, file: TextIO) -> None:
    """Write the table, its conditions and the candidates that were not run to `file`; in colour only on a terminal."""
    console = Console(file=file, highlight=False, width=None if file.isatty() else WIDTH)
    console.print(_table(result))
    conditions = result.conditions
    disturbance = conditions["disturbance"]
    where = [
        conditions["cpu"],
        count_of(conditions["threads"], "thread"),
        f"load average {conditions['load_average'][0]} at the start",
    ]
    where += [] if (apart := distance(disturbance)) is None else [apart]
    console.print(f"{', '.join(where)}.", style="dim", markup=False)
    uncertain = [(row.batch, row.uncertain_because) for row in result.results if row.uncertain_because is not None]
    if uncertain:
        console.print(" ".join(warnings(uncertain, disturbance)), style="yellow", markup=False)
    for gap in gaps(disturbance):
        console.print(gap, style="dim", markup=False)
    for name, shape in conditions.get("shapes", {}).items():
        console.print(f"Shape of {name}: {shape}.", style="dim", markup=False)
    if result.loads:
        console.print(_loads(result))
        if because := next((row.uncertain_because for row in result.loads if not row.certain), None):
            console.print(f"Uncertain under load: {because}.", style="yellow", markup=False)
    if result.scenarios:
        console.print(_scenarios(result))
        for row in result.scenarios:
            if not row.valid:
                which = f"{short_names([other.artifact for other in result.scenarios])[row.artifact]} on {row.backend}, {row.scenario}"
                console.print(f"INVALID: {which}: {'; '.join(row.reasons)}", style="yellow", markup=False)
        console.print(f"LoadGen's logs: {Path(result.scenarios[0].logs).parent}", style="dim", markup=False)
    for layers in result.layers:
        console.print(_layers(layers))
    against = baseline_name(result.baseline)
    console.print(f"Speed-up: over {against} in the same rounds, with its 95 % interval; = where that spans 1.", style="dim")
    console.print(f"Error: largest difference to the outputs of {against}.", style="dim")
    if (during := conditions.get("gpu_during")) and during["throttled"]:
        seen = f"in {during['throttled']} of {during['looks']} looks during the rounds ({during['throttling']})"
        console.print(
            f"Something held the GPU's clocks back {seen}: times may be off. See the conditions in --json.", style="yellow"
        )
    if result.interrupted:
        console.print("Interrupted: this is what had been measured.", style="yellow")
    for title, entries in (("Not run", result.skipped), ("Failed", result.failures)):
        for entry in entries:
            console.print(f"{title}: {entry.artifact} on {entry.backend}: {entry.reason}", style="yellow", markup=False)


def _loads(result: BenchResult) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("under load", overflow="fold", min_width=8)
    table.add_column("backend", overflow="fold", min_width=12)
    for name in ("batch", "load", "requests/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms"):
        table.add_column(name, justify="right", no_wrap=True)
    labels = short_names([row.artifact for row in result.loads])
    for row in result.loads:
        load = (count_of(row.concurrency, "caller") if row.concurrency else f"{row.rate:g}/s") + f", {UNCERTAIN}" * (
            not row.certain
        )
        times = [digits(value) for value in (row.p50_ms, row.p90_ms, row.p99_ms, row.p999_ms)]
        cells = (escape(labels[row.artifact]), row.backend, str(row.batch), load, digits(row.requests_per_s), *times)
        table.add_row(*cells, style="yellow" if row.unanswered or not row.certain else None)
    if any(row.unanswered for row in result.loads):
        table.caption = "Where a rate is more than a candidate answers, its times grow with the length of the test."
    return table


def _scenarios(result: BenchResult) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("LoadGen", overflow="fold", min_width=8)
    table.add_column("backend", overflow="fold", min_width=12)
    table.add_column("scenario", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name in ("result", "queries", "p50 ms", "p90 ms", "p99 ms"):
        table.add_column(name, justify="right", no_wrap=True)
    labels = short_names([row.artifact for row in result.scenarios])
    for row in result.scenarios:
        cells = [labels[row.artifact], row.backend, row.scenario, "VALID" if row.valid else "INVALID"]
        cells += [f"{digits(row.value)} {row.unit}", f"{row.queries:,}", *map(digits, (row.p50_ms, row.p90_ms, row.p99_ms))]
        table.add_row(*map(escape, cells), style=None if row.valid else "yellow")
    server = next((row for row in result.scenarios if row.target_qps is not None), None)
    if server is not None:
        table.caption = f"Of server: {server.target_qps:.3g} queries/s, 99 % of them within {server.target_ms:.3g} ms."
    return table


def _layers(row: LayersRow) -> Table:
    """The layers that take the longest, TOP of them."""
    layers = shares(row.layers)
    name = f"{Path(row.artifact).name} on {row.backend}, batch {row.batch}"
    whole = sum(layer.ms for layer in row.layers)
    shown = layers[:TOP]
    table = Table(
        box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title_justify="left", title_style="bold",
        title=escape(f"{name}: {len(shown)} of {count_of(len(layers), 'layer')}, {sum(part for _, part in shown):.0%} of {digits(whole)} ms"),
    )  # fmt: skip
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("operator", no_wrap=True, max_width=20)
    table.add_column("torch module", overflow="ellipsis", no_wrap=True, max_width=30)
    table.add_column("ONNX node", overflow="ellipsis", no_wrap=True, max_width=32)
    for layer, part in shown:
        module = _first(layer.modules) if layer.modules != ("",) else "(the model itself)"
        cells = [digits(layer.ms), f"{part:.0%}", layer.operator, module, _first(layer.nodes) or layer.name]
        table.add_row(*map(escape, cells))
    return table


def _first(names: Sequence[str]) -> str:
    """The first name that is not empty, and the number of others: `conv1 +2`."""
    named = [name for name in names if name]
    return f"{named[0]}{f' +{len(named) - 1}' if len(named) > 1 else ''}" if named else ""


def print_comparison(comparison: Comparison, file: TextIO) -> None:
    """Write the changes of speed to `file`."""
    console = Console(file=file, highlight=False, width=None if file.isatty() else WIDTH)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("artifact", overflow="fold", min_width=8)
    table.add_column("backend", overflow="fold", min_width=12)
    for name in ("batch", "old p50 ms", "new p50 ms", "times as fast", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    worse = comparison.regressions
    for change in comparison.changes:
        speed = f"{change.speed.value:.2f} ({change.speed.low:.2f}-{change.speed.high:.2f})"
        verdict = "regression" if change in worse else "baseline" if change.is_baseline else change.verdict
        style = "red" if change in worse else "yellow" if change.uncertain_because else None
        cells = (escape(change.artifact), change.backend, str(change.batch), *map(digits, change.p50_ms), speed, verdict)
        table.add_row(*cells, style=style)
    console.print(table)
    console.print(
        "Times as fast: relative to the baseline of each run, with its 95 % interval; the baseline by its time.", style="dim"
    )
    for because in dict.fromkeys(change.uncertain_because for change in comparison.changes if change.uncertain_because):
        console.print(f"Uncertain: {because}.", style="yellow", markup=False)
    for title, keys in (("Only in the old", comparison.only_old), ("Only in the new", comparison.only_new)):
        for artifact, backend, batch in keys:
            console.print(f"{title}: {artifact} on {backend}, batch {batch}", style="dim", markup=False)
    if worse:
        lost = f"{count_of(len(worse), 'candidate')} lost more than {comparison.tolerance:.0%} of {'its' if len(worse) == 1 else 'their'} speed."
        console.print(lost, style="red")
    elif not comparison.uncertain:
        console.print(f"None lost more than {comparison.tolerance:.0%} of its speed.")
    if comparison.uncertain:
        doubtful = count_of(len(comparison.uncertain), "candidate")
        console.print(
            f"The two runs do not tell whether {doubtful} became slower. Run them again on a quieter machine.", style="yellow"
        )


def _table(result: BenchResult) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("artifact", overflow="fold", min_width=8)
    table.add_column("prec.", no_wrap=True)
    table.add_column("backend", overflow="fold", min_width=12)
    scored = [metric_name([vars(row) for row in result.results])] if any(row.score for row in result.results) else []
    for name in ("batch", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up", "error", *scored):
        table.add_column(name, justify="right", no_wrap=True)
    labels = short_names([row.artifact for row in result.results])
    batch = None
    for row in result.results:
        if batch not in (None, row.batch):
            table.add_row()
        batch = row.batch
        style = "yellow" if not row.certain else "bold" if _best(result, row) else None
        table.add_row(escape(labels[row.artifact]), *_cells(row), *(_scored(row) for _ in scored), style=style)
    return table


def _cells(row: BenchRow) -> tuple[str, ...]:
    same = "= " if row.verdict == "no difference" else ""
    speed = f"{same}{row.speedup:.2f} ({row.speedup_low:.2f}-{row.speedup_high:.2f})"
    speed = UNCERTAIN if not row.certain else "1" if row.verdict == "baseline" else speed
    error = "not finite" if row.max_abs_error is None else f"{row.max_abs_error:.1e}" if row.max_abs_error else "0"
    times = [digits(value) for value in (row.p50_ms, row.p90_ms, row.p99_ms)]
    return (row.precision, row.backend, str(row.batch), *times, digits(row.images_per_s), speed, error)


def _scored(row: BenchRow) -> str:
    """The score of a row, with its unit."""
    if row.score is None:
        return "-"
    return "infinite" if row.score["value"] is None else points_text(row.score["value"], row.score["unit"])


def _best(result: BenchResult, row: BenchRow) -> bool:
    """Whether the row has the highest speed-up at its batch size, of those that are certain."""
    return row.speedup == max(other.speedup for other in result.results if other.batch == row.batch and other.certain)
