"""What `deploy tune` prints: the result, why, and a table of the mixes."""

from collections.abc import Iterator, Sequence

from deploy.artifact.artifact import Artifact
from deploy.artifact.summary import metric_text, speedup_text, tuning_text
from deploy.artifact.tuning import TunedPoint, Tuning
from deploy.words import count_of

STOPPED = {
    "minutes": "time ran out (--minutes): what was measured is kept, and the same command goes on",
    "interrupted": "interrupted: this is the best of what had passed; the same command goes on",
}


def text(made: Artifact) -> str:
    """The lines for an artifact that `tune` made."""
    tuning = made.manifest.tuning
    assert tuning is not None
    lines = [f"{made.shown}: {tuning_text(tuning)}", f"  because    {tuning.because}"]
    if tuning.stopped is not None:
        lines.append(f"  note       {STOPPED[tuning.stopped]}")
    return "\n".join([*lines, "", *_aligned([head(tuning), *rows(tuning)]), *_left_out(tuning)])


def head(tuning: Tuning) -> tuple[str, ...]:
    """The titles of `rows`."""
    return ("", f"units in {tuning.codes.upper()}", "time", "predicted", "speed-up", "damage", "loss", "verdict")


def rows(tuning: Tuning) -> list[tuple[str, ...]]:
    """The mixes, the safest first, with floating point before them, a cell for each of `head`."""
    total = len(tuning.units)
    mark = " *"
    floating = (
        tuning.floats + mark * (tuning.result == tuning.floats),
        f"0 of {total}",
        _ms(tuning.p50_ms),
        "",
        "1.00",
        "0",
        "",
        "",
    )
    return [floating, *(_row(point, tuning, mark) for point in tuning.points if point.left_out is None)]


def _row(point: TunedPoint, tuning: Tuning, mark: str) -> tuple[str, ...]:
    return (
        point.name + mark * (point.name == tuning.result),
        f"{len(point.int8)} of {len(tuning.units)}",
        _ms(point.p50_ms),
        _ms(point.predicted * tuning.p50_ms),
        "" if point.speedup is None else speedup_text(point),
        "" if point.damage is None else f"{point.damage:.2g}",
        _loss(point, tuning),
        point.verdict or "not tested",
    )


def _loss(point: TunedPoint, tuning: Tuning) -> str:
    if point.verdict is None:
        return ""
    if point.loss is None:
        return "nothing" if point.value is None else f"{metric_text(tuning.metric)} {point.value:.4g}"
    interval = "" if point.loss_low is None else f" ({point.loss_low:.2f} to {point.loss_high:.2f})"
    return f"{point.loss:.2f}{interval}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms"


def _aligned(table: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {first}  {'  '.join(others)}".rstrip()


def _left_out(tuning: Tuning) -> list[str]:
    left = [point for point in tuning.points if point.left_out is not None]
    return [
        f"  {point.name} ({count_of(len(point.int8), 'unit')} in {tuning.codes.upper()}) was left out: {point.left_out}"
        for point in left
    ]
