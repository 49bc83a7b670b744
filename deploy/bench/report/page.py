"""The page: the verdict first, then figures, every number, the lineage and the conditions."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from deploy.artifact.summary import metric_text, number_text, range_text
from deploy.bench.report import certainty
from deploy.bench.report.figures import (
    figure_section,
    layer_figures,
    roofline,
    speedup_figure,
    spread_figure,
    throughput_and_accuracy,
)
from deploy.bench.report.labels import Labels, Row, baseline_name, digits, make_labels, short_names
from deploy.bench.report.numbers import all_figures, conditions_list, lineage, load_table, scenario_table
from deploy.bench.rows import UNCERTAIN


def render(document: Mapping[str, Any]) -> str:
    """The HTML of the report of a document of `deploy bench --json`."""
    rows: Sequence[Row] = document["results"]
    labels = make_labels(rows)
    batches = sorted({row["batch"] for row in rows})
    against = baseline_name(document["baseline"])
    name = Path(rows[0]["artifact"]).name if rows else "nothing"
    sections = [
        f"<header><h1>{escape(name)}</h1><p class=verdict>{escape(verdict(document))}</p></header>",
        *_warnings(document),
        figure_section(
            "Speed-up",
            f"Over {against}, with the 95 % interval, measured in the same rounds; = where that spans 1.",
            [speedup_figure(rows, labels, batch) for batch in batches],
        ),
        figure_section(
            "Latency",
            "Every run that was timed; p50 and p99 are marked. Pale: disturbed by other programs.",
            [spread_figure(rows, labels, batch) for batch in batches],
        ),
        throughput_and_accuracy(rows, labels, batches),
        roofline(rows, labels, batches),
        layer_figures(document["layers"], labels),
        load_table(document["loads"], labels),
        scenario_table(document["scenarios"], labels),
        _legend(labels),
        all_figures(rows, labels),
        lineage(document.get("artifacts", ())),
        conditions_list(document),
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
    """The result in one sentence: the fastest candidate at the smallest batch, and at the largest."""
    rows = document["results"]
    against = baseline_name(document["baseline"])
    if not any(row["verdict"] != "baseline" for row in rows):
        return f"Nothing was measured beside {against}."
    batches = sorted({row["batch"] for row in rows})
    names = short_names([row["artifact"] for row in rows])
    parts = []
    for batch in dict.fromkeys((batches[0], batches[-1])):
        at_batch = [row for row in rows if row["batch"] == batch]
        best = max((row for row in at_batch if row["verdict"] == "faster"), key=lambda row: row["speedup"], default=None)
        unsure = any(row["verdict"] == UNCERTAIN for row in at_batch)
        if best is None and unsure:
            why = next(row["uncertain_because"] for row in at_batch if row["verdict"] == UNCERTAIN)
            parts.append(f"at batch {batch} the speed-up is uncertain, since {why}")
            continue
        if best is None:
            parts.append(f"at batch {batch} nothing is faster than {against}")
            continue
        low, high = best["speedup_low"], best["speedup_high"]
        baseline = next((row for row in at_batch if row["verdict"] == "baseline"), None)
        parts.append(
            f"at batch {batch} {names[best['artifact']]} ({best['precision']}) on {best['backend']} is fastest{' of what is certain' if unsure else ''}:"
            f" {digits(best['p50_ms'])} ms, {best['speedup']:.2f} times as fast as {against} ({low:.2f} to {high:.2f})"
            f"{_accuracy(best, baseline)}"
        )
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def _accuracy(best: Row, baseline: Row | None) -> str:
    """The accuracy of a row beside that of the baseline, with the interval of the difference, where that is known."""
    score = best["score"]
    if baseline is None or score is None or score["loss"] is None:
        return ""
    name = metric_text(score["metric"])
    interval = ""
    if score["loss_low"] is not None:
        interval = f" (95 % interval of the loss {range_text(score['loss_low'], score['loss_high'], score['unit'])})"
    lost = number_text(abs(score["loss"]), score["unit"])
    points = " points" if score["unit"] == "%" else ""
    if not float(lost):
        return f", at the same {name}{interval}"
    return f", at {lost}{points} {'worse' if score['loss'] > 0 else 'better'} {name}{interval}"


def _legend(labels: Labels) -> str:
    entries = "".join(f'<li><i style="background:var(--c{colour})"></i>{escape(label)}</li>' for label, colour in labels.values())
    return f"<ul class=legend>{entries}</ul>"


def _warnings(document: Mapping[str, Any]) -> list[str]:
    """What the reader must know before the figures."""
    conditions = document["conditions"]
    warnings = [f"Not run: {entry['artifact']} on {entry['backend']}: {entry['reason']}" for entry in document["skipped"]]
    uncertain = [(row["batch"], row["uncertain_because"]) for row in document["results"] if not row["certain"]]
    if said := certainty.warnings(uncertain, conditions["disturbance"]):
        warnings.insert(0, " ".join(said))
    warnings += certainty.gaps(conditions["disturbance"])
    if document["interrupted"]:
        warnings.insert(0, "Interrupted: this is what had been measured.")
    return [f"<p class=note>{escape(text)}</p>" for text in warnings]
