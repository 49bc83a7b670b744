"""The sections of the page that show tables and text."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from deploy.artifact.summary import points_text
from deploy.bench.report import certainty
from deploy.bench.report.labels import Labels, Row, digits, label_of, metric_name, score_of, speed_up
from deploy.words import count_of

_FIRST = (("p50 ms", "p50_ms", None), ("p99", "p99_ms", None), ("images/s", "images_per_s", "{:,.0f}"))
"""What matters first, and the score; then the rest."""
_REST = (
    ("error", "max_abs_error", "{:.1e}"), ("p90", "p90_ms", None), ("p99.9", "p999_ms", None), ("mean", "mean_ms", None),
    ("first ms", "first_ms", None), ("load s", "load_s", "{:.2f}"),
)  # fmt: skip

_GPU_COLUMNS = (("GPU ms", "gpu_ms", None), ("H2D", "h2d_ms", None), ("D2H", "d2h_ms", None))


def table_section(title: str, intro: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A section with a table of text and notes below it; empty without rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{escape(first)}</th>{''.join(_cell(name, cell) for name, cell in zip(head[1:], rest, strict=True))}</tr>"
        for first, *rest in rows
    )
    below = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(intro)}</p>' if intro else ''}{table}{below}</section>"


def _cell(name: str, text: str) -> str:
    """A cell that knows its column: on a narrow screen a row is folded into a card without a head."""
    return f'<td data-name="{escape(name)}">{escape(text)}</td>'


def load_table(results: Sequence[Row], labels: Labels) -> str:
    """Requests and latencies of every candidate under each load."""

    def asked(row: Row) -> str:
        return (f"{row['rate']:g}/s" if row["rate"] else count_of(row["concurrency"], "caller")) + ", uncertain" * (
            not row["certain"]
        )

    rows = [
        (label_of(row, labels), str(row["batch"]), asked(row), digits(row["requests_per_s"]),
         str(row["unanswered"]), *(digits(row[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "p999_ms")))
        for row in results
    ]  # fmt: skip
    head = ("", "batch", "load", "requests/s", "unanswered", "p50 ms", "p90", "p99", "p99.9")
    return table_section("Under load", "Latencies under a rate count from when a request was due.", head, rows)


def scenario_table(results: Sequence[Row], labels: Labels) -> str:
    """LoadGen's verdict and figures of every candidate in each scenario, with the reasons of those that are invalid."""
    rows = [
        (label_of(row, labels), row["scenario"], "VALID" if row["valid"] else "INVALID",
         f"{digits(row['value'])} {row['unit']}", f"{row['queries']:,}",
         *(digits(row[key]) for key in ("p50_ms", "p90_ms", "p99_ms")))
        for row in results
    ]  # fmt: skip
    server = next((row for row in results if row["target_qps"] is not None), None)
    intro = "The verdict is LoadGen's own."
    if server is not None:
        intro += f" Of server: {digits(server['target_qps'])} queries/s, 99 % of them within {digits(server['target_ms'])} ms."
    head = ("", "scenario", "verdict", "result", "queries", "p50 ms", "p90", "p99")
    why = [f"{label_of(row, labels)}, {row['scenario']}: {'; '.join(row['reasons'])}" for row in results if not row["valid"]]
    return table_section("MLPerf LoadGen", intro, head, rows, why)


def all_figures(rows: Sequence[Row], labels: Labels) -> str:
    """Every figure of every row; those of a GPU only where one was used."""
    on_gpu = any(row["gpu_ms"] is not None for row in rows)
    rest = (*_REST, *(_GPU_COLUMNS if on_gpu else ()))
    head = (
        "",
        "batch",
        "speed-up",
        *(column[0] for column in _FIRST),
        metric_name(rows),
        *(column[0] for column in rest),
        "memory",
        *(("GPU memory",) if on_gpu else ()),
        "on disk",
    )
    body = []
    for row in rows:
        cells = [str(row["batch"]), speed_up(row)]
        cells += [_cell_text(row[key], form) for _, key, form in _FIRST]
        score = score_of(row)
        cells.append("\u2013" if score is None else points_text(score, row["score"]["unit"]))
        cells += [_cell_text(row[key], form) for _, key, form in rest]
        cells.append(_megabytes(row["peak_bytes"]))
        if on_gpu:
            cells.append("\u2013" if row["gpu_bytes"] is None else _megabytes(row["gpu_bytes"]))
        cells.append(_megabytes(row["size_bytes"]))
        body.append((label_of(row, labels), *cells))
    return table_section("All figures", "", head, body)


def _cell_text(value: float | None, form: str | None) -> str:
    return "\u2013" if value is None else form.format(value) if form else digits(value)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 10**7 else f"{size / 1e6:.2g} MB"


def lineage(artifacts: Sequence[Mapping[str, Any]]) -> str:
    """The tree from the state_dict to each artifact, with the evidence of every step."""
    if not artifacts:
        return ""
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    known = {entry["digest"] for entry in artifacts}
    for entry in artifacts:
        children.setdefault(entry["parent"] if entry["parent"] in known else None, []).append(entry)

    def branch(parent: str | None) -> str:
        items = "".join(f"<li>{_artifact(entry)}{branch(entry['digest'])}</li>" for entry in children.get(parent, ()))
        return f"<ul>{items}</ul>" if items else ""

    root = artifacts[0]
    weights = "random weights" if root["random"] else root["weights"] or "the ONNX file's own weights"
    head = f"<p>{escape(weights)} (state_dict {escape(root['state_dict'][:12])})</p>"
    return f"<section class=lineage><h2>Lineage</h2>{head}{branch(None)}</section>"


def _artifact(entry: Mapping[str, Any]) -> str:
    evidence = "".join(f"<li>{escape(line)}</li>" for line in entry["evidence"])
    return f"<b>{escape(entry['name'])}</b> {escape(entry['what'])}<ul class=evidence>{evidence}</ul>"


def conditions_list(document: Mapping[str, Any]) -> str:
    """What the benchmark was measured on."""
    where = document["conditions"]
    inputs = ", ".join(
        f"batch {batch}: {made['inputs']} of {_megabytes(made['bytes'])} together"
        for batch, made in where["inputs"]["by_batch"].items()
    )
    lines = {
        "measured": where["time"],
        "processor": f"{where['cpu']}, {count_of(where['cores'], 'core')}, {count_of(where['threads'], 'thread')}",
        "governor": where["governor"] or "not reported by the kernel",
        "CPU limit": f"{where['cpu_limit']:g} cores, by control groups" if where["cpu_limit"] is not None else "none",
        "other programs": _others(where["disturbance"]),
        "cores": _cores(where["disturbance"]),
        "load average": f"{where['load_average'][0]} before, {where['load_average_after'][0]} after",
        "GPU": _listed(where["gpu"] or {}) or "none used",
        "GPU during the rounds": _listed(where.get("gpu_during") or {}) or "\u2013",
        "inputs": f"{where['inputs']['from']} ({inputs})",
        "versions": _listed(where["versions"]),
        "git revision": where["revision"] or "none",
        "system": where["platform"],
    }
    entries = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in lines.items())
    return f"<section><h2>Conditions</h2><dl>{entries}</dl></section>"


def _cores(disturbance: Mapping[str, Any]) -> str:
    """What the cores were like."""
    steps = disturbance.get("step_ns")
    said = [] if steps is None else [f"{steps[1]:.1f} ns for a step of an interpreter's loop"]
    return ", ".join([*said, certainty.distance(disturbance) or ""]).strip(", ") or "not measured"


def _others(disturbance: Mapping[str, Any]) -> str:
    """What other programs did in the rounds that were taken."""
    used, waited = disturbance["others_cores"], disturbance["waited_share"]
    said = ["not measured" if used is None else f"{used:.2f} of {count_of(disturbance['cores'], 'core')}"]
    if waited is not None:
        said.append(f"the baseline's threads waited for a core in {waited:.1%} of the time")
    return f"{', '.join(said)}; {count_of(disturbance['repeated_rounds'], 'round')} measured again"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value)
