"""The sections of the page that show figures."""

from collections.abc import Sequence
from html import escape
from typing import Any

from deploy.bench.report.charts import Bar, Dot, Line, Roofed, Spread, durations, pareto, roofs, speedups, spreads, throughputs
from deploy.bench.report.labels import Labels, Row, digits, metric_name, score_of, speed_up
from deploy.bench.rows import UNCERTAIN

TOP = 10
LABEL = 34
"""Letters of a layer's name."""


def figure_section(title: str, intro: str, figures: Sequence[str]) -> str:
    """A section with a grid of SVG figures; empty without figures."""
    if not figures:
        return ""
    cards = "".join(f"<figure><figcaption>{_caption(figure)}</figcaption>{figure}</figure>" for figure in figures)
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(intro)}</p>' if intro else ''}<div class=grid>{cards}</div></section>"


def _caption(figure: str) -> str:
    return figure.partition("<title>")[2].partition("</title>")[0]


def _of(row: Row, labels: Labels) -> dict[str, Any]:
    label, colour = labels[row["artifact"], row["backend"]]
    return {"label": label, "colour": colour, "certain": row["certain"]}


def speedup_figure(rows: Sequence[Row], labels: Labels, batch: int) -> str:
    bars = []
    for row in (row for row in rows if row["batch"] == batch):
        note = f"= {speed_up(row)}" if row["verdict"] == "no difference" else speed_up(row)
        bars.append(Bar(**_of(row, labels), value=row["speedup"], low=row["speedup_low"], high=row["speedup_high"], note=note))
    return speedups(f"Batch {batch}", bars)


def spread_figure(rows: Sequence[Row], labels: Labels, batch: int) -> str:
    chosen = [row for row in rows if row["batch"] == batch]
    return spreads(
        f"Batch {batch}",
        [Spread(**_of(row, labels), samples_ms=row["samples_ms"], p50=row["p50_ms"], p99=row["p99_ms"]) for row in chosen],
    )


def throughput_and_accuracy(rows: Sequence[Row], labels: Labels, batches: Sequence[int]) -> str:
    figures = []
    if len(batches) > 1:
        lines = []
        for key, (label, colour) in labels.items():
            points = [(row["batch"], row["images_per_s"]) for row in rows if (row["artifact"], row["backend"]) == key]
            doubtful = [
                (row["batch"], row["images_per_s"])
                for row in rows
                if (row["artifact"], row["backend"]) == key and not row["certain"]
            ]
            lines.append(Line(label=label, colour=colour, points=sorted(points), doubtful=doubtful))
        figures.append(throughputs("Throughput against batch size", lines))
    known = [row for row in rows if score_of(row) is not None and row["batch"] == batches[0]]
    if known:
        on_front = front(known)
        dots = [Dot(**_of(row, labels), x=row["p50_ms"], y=score_of(row) or 0.0, front=row in on_front) for row in known]
        name, unit = metric_name(known), known[0]["score"]["unit"]
        figures.append(pareto(f"{name} against latency, batch {batches[0]}", dots, f"{name} in {unit}" if unit else name, unit))
    return figure_section(
        "Throughput and accuracy",
        "Ringed and joined: the fastest, and those that are slower and more accurate, by more than chance." if known else "",
        figures,
    )


def front(rows: Sequence[Row]) -> list[Row]:
    """The Pareto front of scores against latency, of what is certain: those that no other beats, by more than chance.

    The fastest is one. A slower one is where it scores better than every faster one, by more than chance. Two whose intervals of
    the speed-up overlap are equally fast, and the better is taken, then the faster.
    """
    chosen: list[Row] = []
    for row in sorted((row for row in rows if row["certain"]), key=lambda row: row["p50_ms"]):
        if all(_better(row, other) for other in chosen):
            chosen = [other for other in chosen if not _as_fast(row, other)]
            chosen.append(row)
    return chosen


def _better(row: Row, other: Row) -> bool:
    """Whether a row scores better than another, by more than chance: the 95 % intervals do not overlap.

    Those of their losses, where these are of one baseline, which are narrow since they are paired; else those of the scores
    themselves. Where there is no interval, chance cannot be told.
    """
    score, against = row["score"], other["score"]
    if _reference(score) == _reference(against):
        best, least = _losses(score)[1], _losses(against)[0]
    elif score["lower"]:
        best, least = score["high"], against["low"]
    else:
        best, least = against["high"], score["low"]
    return best is not None and least is not None and bool(best < least)


def _reference(score: Row) -> float:
    """The score of what a loss is measured from: a row without a loss is that itself."""
    reference: float = score["value"] if score["parent"] is None else score["parent"]
    return reference


def _losses(score: Row) -> tuple[float | None, float | None]:
    """The interval of the loss; none is lost of what losses are measured from."""
    return (0.0, 0.0) if score["loss"] is None else (score["loss_low"], score["loss_high"])


def _as_fast(row: Row, other: Row) -> bool:
    """Whether a row may be as fast as another: the intervals of their speed-ups over the same baseline overlap."""
    return bool(row["speedup_high"] >= other["speedup_low"] and other["speedup_high"] >= row["speedup_low"])


def roofline(rows: Sequence[Row], labels: Labels, batches: Sequence[int]) -> str:
    figures = []
    for batch in batches:
        known = [row for row in rows if row["batch"] == batch and row["gflops"] is not None]
        if known:
            bars = []
            for row in known:
                share = row["gflops"] / row["roof_gflops"]
                note = f"{row['gflops']:,.0f} of {row['roof_gflops']:,.0f} ({share:.0%})" if row["certain"] else UNCERTAIN
                bars.append(Roofed(**_of(row, labels), value=row["gflops"], roof=row["roof_gflops"], note=note))
            figures.append(roofs(f"Batch {batch}", bars))
    intro = (
        "Billions of operations a second, and the mark of what a matrix product and a copy, timed here in FP32, would allow that"
        " candidate: the rest could still be gained. INT8 may go beyond."
    )
    return figure_section("Roofline", intro, figures)


def layer_figures(rows: Sequence[Row], labels: Labels) -> str:
    figures = []
    for row in rows:
        layers = sorted(row["layers"], key=lambda layer: -layer["ms"])
        whole = sum(layer["ms"] for layer in layers)
        label, colour = labels[row["artifact"], row["backend"]]
        bars = [
            Bar(label=_layer_name(layer), colour=colour, value=layer["ms"], low=layer["ms"], high=layer["ms"],
                note=f"{digits(layer['ms'])} ms ({layer['ms'] / whole:.0%})")
            for layer in layers[:TOP]
        ]  # fmt: skip
        if bars:
            figures.append(durations(f"{label}, batch {row['batch']}", bars))
    intro = f"The {TOP} longest of each, by torch module or ONNX node, and their share of the sum of all."
    return figure_section("Layers", intro, figures)


def _layer_name(layer: Row) -> str:
    if layer["modules"] == [""]:
        return f"the model itself ({layer['operator']})"
    named = [name for name in (*layer["modules"], *layer["nodes"], layer["name"]) if name]
    name = f"{named[0]} ({layer['operator']})"
    return name if len(name) <= LABEL else f"\u2026{name[1 - LABEL :]}"
