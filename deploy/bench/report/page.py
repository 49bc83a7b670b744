"""The page: the verdict first, then figures, every number, the lineage and the conditions."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from deploy.bench.report.charts import (
    COLOURS,
    Bar,
    Dot,
    Line,
    Spread,
    digits,
    durations,
    pareto,
    roofs,
    speedups,
    spreads,
    throughputs,
)

Row = Mapping[str, Any]
Labels = Mapping[tuple[str, str], tuple[str, int]]
"""Name and colour by artifact and backend."""

TOP = 10
LABEL = 34
"""Letters of a layer's name."""


def render(document: Mapping[str, Any]) -> str:
    """The HTML of the report of a document of `deploy bench --json`."""
    rows: Sequence[Row] = document["results"]
    labels = _labels(rows)
    batches = sorted({row["batch"] for row in rows})
    against = "eager PyTorch" if document["baseline"] == "eager" else document["baseline"]
    name = Path(rows[0]["artifact"]).name if rows else "nothing"
    sections = [
        f"<header><h1>{escape(name)}</h1><p class=verdict>{escape(verdict(document))}</p></header>",
        *_warnings(document),
        _figures(
            "Speed-up",
            f"Over {against}, with the 95 % interval, measured in the same rounds; = where that spans 1.",
            [_speedup(rows, labels, b) for b in batches],
        ),
        _figures(
            "Latency", "Every run that was timed; p50 and p99 are marked.", [_spread(rows, labels, batch) for batch in batches]
        ),
        _more(rows, labels, batches),
        _roofline(rows, labels, batches),
        _layers(document["layers"], labels),
        _loads(document["loads"], labels),
        _scenarios(document["scenarios"], labels),
        _legend(labels),
        _table(rows, labels),
        _lineage(document.get("artifacts", ())),
        _conditions(document),
    ]
    style = resources.files("deploy.bench.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(name)}: deploy bench</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main></body></html>\n"
    )


def verdict(document: Mapping[str, Any]) -> str:
    """What the benchmark says, in a sentence: the fastest at the smallest batch, and at the largest where it is another."""
    rows = document["results"]
    against = "eager PyTorch" if document["baseline"] == "eager" else document["baseline"]
    if not any(row["verdict"] != "baseline" for row in rows):
        return f"Nothing was measured beside {against}."
    batches = sorted({row["batch"] for row in rows})
    said = []
    for batch in dict.fromkeys((batches[0], batches[-1])):
        faster = [row for row in rows if row["batch"] == batch and row["verdict"] == "faster"]
        if not faster:
            said.append(f"at batch {batch} nothing is faster than {against}")
            continue
        best = max(faster, key=lambda row: row["speedup"])
        low, high = best["speedup_low"], best["speedup_high"]
        text = (
            f"at batch {batch} {Path(best['artifact']).name} ({best['precision']}) on {best['backend']} is fastest:"
            f" {digits(best['p50_ms'])} ms, {best['speedup']:.2f} times as fast as {against} ({low:.2f} to {high:.2f})"
        )
        first = next((row for row in rows if row["batch"] == batch and row["verdict"] == "baseline"), None)
        if first is not None and best["top1"] is not None and first["top1"] is not None:
            lost = first["top1"] - best["top1"]
            text += (
                f", at {abs(lost):.2f} points {'less' if lost > 0 else 'more'} of top-1 accuracy"
                if lost
                else ", at the same top-1"
            )
        said.append(text)
    sentence = "; ".join(said)
    return sentence[0].upper() + sentence[1:] + "."


def _labels(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[str, int]]:
    """Name and colour of every candidate, by artifact and backend; the baseline's colour is 0."""
    several = len({row["artifact"] for row in rows}) > 1
    found: dict[tuple[str, str], tuple[str, int]] = {}
    for row in sorted(rows, key=lambda row: row["verdict"] != "baseline"):
        key = (row["artifact"], row["backend"])
        if key not in found:
            name = Path(row["artifact"]).name if several else ""
            name = " ".join(filter(None, (name, row["precision"] * (row["precision"] not in name))))
            colour = 0 if row["verdict"] == "baseline" else 1 + (len(found) - 1) % (COLOURS - 1)
            found[key] = (f"{name}, {row['backend']}", colour)
    return found


def _of(row: Row, labels: Labels) -> dict[str, Any]:
    label, colour = labels[row["artifact"], row["backend"]]
    return {"label": label, "colour": colour}


def _speedup(rows: Sequence[Row], labels: Labels, batch: int) -> str:
    bars = []
    for row in (row for row in rows if row["batch"] == batch):
        low, high = row["speedup_low"], row["speedup_high"]
        note = "1" if row["verdict"] == "baseline" else f"{row['speedup']:.2f} ({low:.2f}\u2013{high:.2f})"
        note = f"= {note}" if row["verdict"] == "no difference" else note
        bars.append(Bar(**_of(row, labels), value=row["speedup"], low=low, high=high, note=note))
    return speedups(f"Batch {batch}", bars)


def _spread(rows: Sequence[Row], labels: Labels, batch: int) -> str:
    chosen = [row for row in rows if row["batch"] == batch]
    return spreads(
        f"Batch {batch}",
        [Spread(**_of(row, labels), samples_ms=row["samples_ms"], p50=row["p50_ms"], p99=row["p99_ms"]) for row in chosen],
    )


def _more(rows: Sequence[Row], labels: Labels, batches: Sequence[int]) -> str:
    figures = []
    if len(batches) > 1:
        lines = []
        for key, (label, colour) in labels.items():
            points = [(row["batch"], row["images_per_s"]) for row in rows if (row["artifact"], row["backend"]) == key]
            lines.append(Line(label=label, colour=colour, points=sorted(points)))
        figures.append(throughputs("Throughput against batch size", lines))
    known = [row for row in rows if row["top1"] is not None and row["batch"] == batches[0]]
    if known:
        dots = []
        for row in known:
            beaten = any(
                (other["top1"] >= row["top1"] and other["p50_ms"] < row["p50_ms"])
                or (other["top1"] > row["top1"] and other["p50_ms"] <= row["p50_ms"])
                for other in known
            )
            dots.append(Dot(**_of(row, labels), x=row["p50_ms"], y=row["top1"], front=not beaten))
        figures.append(pareto(f"Accuracy against latency, batch {batches[0]}", dots))
    return _figures("Throughput and accuracy", "Ringed and joined: what nothing else beats in both." if known else "", figures)


def _roofline(rows: Sequence[Row], labels: Labels, batches: Sequence[int]) -> str:
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
    said = (
        "Billions of operations a second, and the share of what a matrix product and a copy, timed here in FP32, would allow: what is"
        " left to gain. INT8 may go beyond."
    )
    return _figures("Roofline", said, figures)


def _layers(found: Sequence[Row], labels: Labels) -> str:
    figures = []
    for row in found:
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
    said = f"The {TOP} longest of each, by torch module or ONNX node, and their share of the sum of all."
    return _figures("Layers", said, figures)


def _layer_name(layer: Row) -> str:
    if layer["modules"] == [""]:
        return f"the model itself ({layer['operator']})"
    named = [name for name in (*layer["modules"], *layer["nodes"], layer["name"]) if name]
    name = f"{named[0]} ({layer['operator']})"
    return name if len(name) <= LABEL else f"\u2026{name[1 - LABEL :]}"


def _loads(found: Sequence[Row], labels: Labels) -> str:
    def asked(row: Row) -> str:
        if row["rate"]:
            return f"{row['rate']:g}/s"
        return "1 caller" if row["concurrency"] == 1 else f"{row['concurrency']} callers"

    rows = [
        (labels[row["artifact"], row["backend"]][0], str(row["batch"]), asked(row), digits(row["requests_per_s"]),
         str(row["unanswered"]), *(digits(row[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "p999_ms")))
        for row in found
    ]  # fmt: skip
    head = ("", "batch", "load", "requests/s", "unanswered", "p50 ms", "p90", "p99", "p99.9")
    said = "Latencies under a rate count from when a request was due."
    return _numbers("Under load", said, head, rows)


def _scenarios(found: Sequence[Row], labels: Labels) -> str:
    rows = [
        (labels[row["artifact"], row["backend"]][0], row["scenario"], "VALID" if row["valid"] else "INVALID",
         f"{digits(row['value'])} {row['unit']}", f"{row['queries']:,}",
         *(digits(row[key]) for key in ("p50_ms", "p90_ms", "p99_ms")))
        for row in found
    ]  # fmt: skip
    server = next((row for row in found if row["target_qps"] is not None), None)
    said = "The verdict is LoadGen's own."
    if server is not None:
        said += f" Of server: {digits(server['target_qps'])} queries/s, 99 % of them within {digits(server['target_ms'])} ms."
    head = ("", "scenario", "verdict", "result", "queries", "p50 ms", "p90", "p99")
    why = [
        f"{labels[row['artifact'], row['backend']][0]}, {row['scenario']}: {'; '.join(row['reasons'])}"
        for row in found
        if not row["valid"]
    ]
    return _numbers("MLPerf LoadGen", said, head, rows, why)


def _numbers(title: str, said: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A section with a table of text and notes below it; nothing where there are no rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    below = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(said)}</p>' if said else ''}<div class=scroll>{table}</div>{below}</section>"


def _figures(title: str, said: str, figures: Sequence[str]) -> str:
    if not figures:
        return ""
    cards = "".join(f"<figure><figcaption>{_caption(figure)}</figcaption>{figure}</figure>" for figure in figures)
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(said)}</p>' if said else ''}<div class=grid>{cards}</div></section>"


def _caption(figure: str) -> str:
    return figure.partition("<title>")[2].partition("</title>")[0]


def _legend(labels: Labels) -> str:
    entries = "".join(f'<li><i style="background:var(--c{colour})"></i>{escape(label)}</li>' for label, colour in labels.values())
    return f"<ul class=legend>{entries}</ul>"


def _warnings(document: Mapping[str, Any]) -> list[str]:
    conditions = document["conditions"]
    said = [f"Not run: {entry['artifact']} on {entry['backend']}: {entry['reason']}" for entry in document["skipped"]]
    if conditions["load_average"][0] >= conditions["threads"]:
        said.insert(0, "The machine was busy: times and speed-ups may be far off.")
    if document["interrupted"]:
        said.insert(0, "Interrupted: this is what had been measured.")
    return [f"<p class=note>{escape(text)}</p>" for text in said]


_COLUMNS = (
    ("batch", "batch", "{:d}"), ("p50 ms", "p50_ms", None), ("p90", "p90_ms", None), ("p99", "p99_ms", None), ("p99.9", "p999_ms", None),
    ("mean", "mean_ms", None), ("images/s", "images_per_s", "{:,.0f}"), ("first ms", "first_ms", None), ("load s", "load_s", "{:.2f}"),
    ("top-1", "top1", "{:.2f}"), ("error", "max_abs_error", "{:.1e}"),
)  # fmt: skip

_GPU_COLUMNS = (("GPU ms", "gpu_ms", None), ("H2D", "h2d_ms", None), ("D2H", "d2h_ms", None))


def _table(rows: Sequence[Row], labels: Labels) -> str:
    on_gpu = any(row["gpu_ms"] is not None for row in rows)
    columns = (*_COLUMNS, *(_GPU_COLUMNS if on_gpu else ()))
    head = ("", *(column[0] for column in columns), "memory", *(("GPU memory",) if on_gpu else ()), "on disk", "speed-up")
    body = []
    for row in rows:
        cells = []
        for _, key, form in columns:
            value = row[key]
            cells.append("\u2013" if value is None else form.format(value) if form else digits(value))
        cells.append(_megabytes(row["peak_bytes"]))
        if on_gpu:
            cells.append("\u2013" if row["gpu_bytes"] is None else _megabytes(row["gpu_bytes"]))
        cells.append(_megabytes(row["size_bytes"]))
        cells.append(
            "1"
            if row["verdict"] == "baseline"
            else f"{row['speedup']:.2f} ({row['speedup_low']:.2f}\u2013{row['speedup_high']:.2f})"
        )
        body.append((labels[row["artifact"], row["backend"]][0], *cells))
    return _numbers("All figures", "", head, body)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 10**7 else f"{size / 1e6:.2g} MB"


def _lineage(artifacts: Sequence[Mapping[str, Any]]) -> str:
    """From the state_dict to each artifact, with the evidence of every step."""
    if not artifacts:
        return ""
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    known = {entry["digest"] for entry in artifacts}
    for entry in artifacts:
        children.setdefault(entry["parent"] if entry["parent"] in known else None, []).append(entry)

    def branch(parent: str | None) -> str:
        found = children.get(parent, ())
        items = "".join(f"<li>{_artifact(entry)}{branch(entry['digest'])}</li>" for entry in found)
        return f"<ul>{items}</ul>" if items else ""

    root = artifacts[0]
    weights = "random weights" if root["random"] else root["weights"] or "the ONNX file's own weights"
    head = f"<p>{escape(weights)} (state_dict {escape(root['state_dict'][:12])})</p>"
    return f"<section class=lineage><h2>Lineage</h2>{head}{branch(None)}</section>"


def _artifact(entry: Mapping[str, Any]) -> str:
    evidence = "".join(f"<li>{escape(line)}</li>" for line in entry["evidence"])
    return f"<b>{escape(entry['name'])}</b> {escape(entry['what'])}<ul class=evidence>{evidence}</ul>"


def _conditions(document: Mapping[str, Any]) -> str:
    found = document["conditions"]
    inputs = ", ".join(
        f"batch {batch}: {each['inputs']} of {_megabytes(each['bytes'])} together"
        for batch, each in found["inputs"]["by_batch"].items()
    )
    gpu = found["gpu"] or {}
    lines = {
        "measured": found["time"],
        "processor": f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads",
        "governor": found["governor"] or "not told by the kernel",
        "load average": f"{found['load_average'][0]} before, {found['load_average_after'][0]} after",
        "GPU": ", ".join(f"{key} {value}" for key, value in gpu.items()) or "none used",
        "GPU after": ", ".join(f"{key} {value}" for key, value in (found["gpu_after"] or {}).items()) or "\u2013",
        "inputs": f"{found['inputs']['from']} ({inputs})",
        "versions": ", ".join(f"{key} {value}" for key, value in found["versions"].items() if value),
        "git revision": found["revision"] or "none",
        "system": found["platform"],
    }
    entries = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in lines.items())
    return f"<section><h2>Conditions</h2><dl>{entries}</dl></section>"
