"""The page: the verdict first, then figures, every number, the lineage and the conditions."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from deploy.bench.report.charts import COLOURS, Bar, Dot, Line, Spread, digits, pareto, roofs, speedups, spreads, throughputs

Row = Mapping[str, Any]


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


def _of(row: Row, labels: Mapping[tuple[str, str], tuple[str, int]]) -> dict[str, Any]:
    label, colour = labels[row["artifact"], row["backend"]]
    return {"label": label, "colour": colour}


def _speedup(rows: Sequence[Row], labels: Mapping[tuple[str, str], tuple[str, int]], batch: int) -> str:
    bars = []
    for row in (row for row in rows if row["batch"] == batch):
        low, high = row["speedup_low"], row["speedup_high"]
        note = "1" if row["verdict"] == "baseline" else f"{row['speedup']:.2f} ({low:.2f}\u2013{high:.2f})"
        note = f"= {note}" if row["verdict"] == "no difference" else note
        bars.append(Bar(**_of(row, labels), value=row["speedup"], low=low, high=high, note=note))
    return speedups(f"Batch {batch}", bars)


def _spread(rows: Sequence[Row], labels: Mapping[tuple[str, str], tuple[str, int]], batch: int) -> str:
    chosen = [row for row in rows if row["batch"] == batch]
    return spreads(
        f"Batch {batch}",
        [Spread(**_of(row, labels), samples_ms=row["samples_ms"], p50=row["p50_ms"], p99=row["p99_ms"]) for row in chosen],
    )


def _more(rows: Sequence[Row], labels: Mapping[tuple[str, str], tuple[str, int]], batches: Sequence[int]) -> str:
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


def _roofline(rows: Sequence[Row], labels: Mapping[tuple[str, str], tuple[str, int]], batches: Sequence[int]) -> str:
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


def _figures(title: str, said: str, figures: Sequence[str]) -> str:
    if not figures:
        return ""
    cards = "".join(f"<figure><figcaption>{_caption(figure)}</figcaption>{figure}</figure>" for figure in figures)
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(said)}</p>' if said else ''}<div class=grid>{cards}</div></section>"


def _caption(figure: str) -> str:
    return figure.partition("<title>")[2].partition("</title>")[0]


def _legend(labels: Mapping[tuple[str, str], tuple[str, int]]) -> str:
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


def _table(rows: Sequence[Row], labels: Mapping[tuple[str, str], tuple[str, int]]) -> str:
    head = "".join(
        f"<th>{escape(title)}</th>" for title in ("", *(column[0] for column in _COLUMNS), "memory", "on disk", "speed-up")
    )
    body = []
    for row in rows:
        cells = []
        for _, key, form in _COLUMNS:
            value = row[key]
            cells.append("\u2013" if value is None else form.format(value) if form else digits(value))
        cells += [_megabytes(row["peak_bytes"]), _megabytes(row["size_bytes"])]
        cells.append(
            "1"
            if row["verdict"] == "baseline"
            else f"{row['speedup']:.2f} ({row['speedup_low']:.2f}\u2013{row['speedup_high']:.2f})"
        )
        label = labels[row["artifact"], row["backend"]][0]
        body.append(f"<tr><th scope=row>{escape(label)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<section><h2>All figures</h2><div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></section>"


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
