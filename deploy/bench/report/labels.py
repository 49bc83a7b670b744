"""How a report names candidates and writes figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.artifact.summary import metric_text
from deploy.bench.rows import UNCERTAIN

COLOURS = 8
"""The page defines --c0 to --c7; --c0 is the baseline's."""

Row = Mapping[str, Any]
"""An entry of a list in the document of `deploy bench --json`."""

Labels = Mapping[tuple[str, str], tuple[str, int]]
"""Name and colour by artifact and backend."""


def baseline_name(baseline: str) -> str:
    """The baseline in a sentence."""
    return "eager PyTorch" if baseline == "eager" else baseline


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path if no other path ends in it, else the whole path."""
    unique = set(paths)
    names = Counter(Path(path).name for path in unique)
    return {path: Path(path).name if names[Path(path).name] == 1 else path for path in unique}


def make_labels(rows: Sequence[Row]) -> Labels:
    """Name and colour of every candidate, by artifact and backend; the baseline's colour is 0."""
    names = short_names([row["artifact"] for row in rows])
    labels: dict[tuple[str, str], tuple[str, int]] = {}
    for row in sorted(rows, key=lambda row: row["verdict"] != "baseline"):
        key = (row["artifact"], row["backend"])
        if key not in labels:
            name = names[row["artifact"]] if len(names) > 1 else ""
            name = " ".join(filter(None, (name, row["precision"] * (row["precision"] not in name))))
            colour = 0 if row["verdict"] == "baseline" else 1 + (len(labels) - 1) % (COLOURS - 1)
            labels[key] = (f"{name}, {row['backend']}", colour)
    return labels


def label_of(row: Row, labels: Labels) -> str:
    """The name of the candidate that a row is about."""
    return labels[row["artifact"], row["backend"]][0]


def digits(value: float) -> str:
    """Three significant digits, more before the point if there are more."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def speed_up(row: Row) -> str:
    """The speed-up of a row with its interval; 1 for the baseline, and a word where it is uncertain."""
    if not row["certain"]:
        return UNCERTAIN
    if row["verdict"] == "baseline":
        return "1"
    return f"{row['speedup']:.2f} ({row['speedup_low']:.2f}\u2013{row['speedup_high']:.2f})"


def score_of(row: Row) -> float | None:
    """The score of a row, of whatever metric; None where it has none, or it is infinite."""
    return None if row["score"] is None else row["score"]["value"]


def metric_name(rows: Sequence[Row]) -> str:
    """The metric that rows have scores of, as it is called on axes and tables."""
    return next((metric_text(row["score"]["metric"]) for row in rows if row["score"] is not None), "accuracy")
