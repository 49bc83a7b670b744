"""The sections of the page that show figures."""

from collections.abc import Sequence
from html import escape
from typing import Any

from deploy.bench.report.charts import Bar, Dot, Line, Spread, durations, pareto, roofs, speedups, spreads, throughputs
from deploy.bench.report.labels import Labels, Row, digits, goodness, metric_name, score_of, speed_up

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
    return {"label": label, "colour": colour}


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
            lines.append(Line(label=label, colour=colour, points=sorted(points)))
        figures.append(throughputs("Throughput against batch size", lines))
    known = [row for row in rows if score_of(row) is not None and row["batch"] == batches[0]]
    if known:
        dots = []
        for row in known:
            good = goodness(row)
            beaten = any(
                (goodness(other) >= good and other["p50_ms"] < row["p50_ms"])
                or (goodness(other) > good and other["p50_ms"] <= row["p50_ms"])
                for other in known
            )
            dots.append(Dot(**_of(row, labels), x=row["p50_ms"], y=score_of(row) or 0.0, front=not beaten))
        name, unit = metric_name(known), known[0]["score"]["unit"]
        figures.append(pareto(f"{name} against latency, batch {batches[0]}", dots, f"{name} in {unit}" if unit else name, unit))
    return figure_section(
        "Throughput and accuracy", "Ringed and joined: candidates that no other beats in both." if known else "", figures
    )


def roofline(rows: Sequence[Row], labels: Labels, batches: Sequence[int]) -> str:
    figures = []
    for batch in batches:
        known = [row for row in rows if row["batch"] == batch and row["gflops"] is not None]
        if known:
            bars = []
            for row in known:
                share = row["gflops"] / row["roof_gflops"]
                note = f"{row['gflops']:,.0f} ({share:.0%})"
                bars.append(Bar(**_of(row, labels), value=row["gflops"], low=row["gflops"], high=row["gflops"], note=note))
            figures.append(roofs(f"Batch {batch}", bars, max(row["roof_gflops"] for row in known)))
    intro = (
        "Billions of operations a second, and their share of what a matrix product and a copy, timed here in FP32, would allow: the"
        " rest could still be gained. INT8 may go beyond."
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
