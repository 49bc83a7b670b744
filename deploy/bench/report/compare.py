"""A comparison of two benchmark documents: what became slower or faster."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bench.rows import SCHEMA, verdict_of
from deploy.errors import UsageError
from deploy.evidence.timing import Ratio, bootstrap, interval

TOLERANCE = 0.05
"""The share of its speed that a candidate may lose."""

Key = tuple[str, str, int]
"""Artifact, backend, batch."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One candidate in both documents.

    speed: how many times as fast as before, both relative to the baseline of their own run, so that a change of the machine's
    clock rate does not count; for the baseline itself, by its time. p50_ms: before and now.
    """

    artifact: str
    backend: str
    batch: int
    p50_ms: tuple[float, float]
    speed: Ratio
    is_baseline: bool
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The candidates in both documents, and those in only one of them."""

    changes: tuple[Change, ...]
    only_old: tuple[Key, ...]
    only_new: tuple[Key, ...]
    tolerance: float

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Candidates that lost more than `tolerance` of their speed, with an interval that does not reach 1."""
        return tuple(
            change
            for change in self.changes
            if not change.is_baseline and change.speed.value < 1 - self.tolerance and change.speed.high < 1
        )

    def to_json(self) -> dict[str, Any]:
        """The document of `deploy bench --compare --json`."""
        return {
            "schema": SCHEMA,
            "tolerance": self.tolerance,
            "changes": [asdict(change) for change in self.changes],
            "regressions": [[change.artifact, change.backend, change.batch] for change in self.regressions],
            "only_old": self.only_old,
            "only_new": self.only_new,
        }


def compare_files(old: Path, new: Path, tolerance: float = TOLERANCE) -> Comparison:
    """Compare two documents that `deploy bench --json` wrote.

    Raises UsageError for a file that is no such document, has another schema or another baseline, and when they share no candidate.
    """
    if not 0 <= tolerance < 1:
        raise UsageError(f"`tolerance` must be 0 or more and less than 1, not {tolerance:g}")
    before, now = _read(old), _read(new)
    if before["baseline"] != now["baseline"]:
        raise UsageError(
            f"{old} is measured against {before['baseline']} and {new} against {now['baseline']}: they cannot be compared"
        )
    rows = [{_key(row): row for row in document["results"]} for document in (before, now)]
    changes = [_change(rows[0], rows[1], key) for key in rows[0] if key in rows[1]]
    if not changes:
        raise UsageError(f"{old} and {new} have no artifact, backend and batch size in common")
    return Comparison(
        changes=tuple(changes),
        only_old=tuple(key for key in rows[0] if key not in rows[1]),
        only_new=tuple(key for key in rows[1] if key not in rows[0]),
        tolerance=tolerance,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or "results" not in document or "schema" not in document:
        raise UsageError(f"{path} is not a document of `deploy bench --json`")
    if document["schema"] != SCHEMA:
        raise UsageError(f"{path} has schema {document['schema']}; this version compares schema {SCHEMA}: measure again")
    return document


def _key(row: Mapping[str, Any]) -> Key:
    return row["artifact"], row["backend"], row["batch"]


def _change(old: Mapping[Key, Mapping[str, Any]], new: Mapping[Key, Mapping[str, Any]], key: Key) -> Change:
    before, now = old[key], new[key]
    is_baseline = before["verdict"] == "baseline"
    sides = []
    for seed, (row, rows) in enumerate(((before, old), (now, new))):
        baseline = next(other for other in rows.values() if other["verdict"] == "baseline" and other["batch"] == key[2])
        series = _rounds(row)
        reference = [[1.0]] * len(series) if is_baseline else _rounds(baseline)
        sides.append(bootstrap(reference, series, seed=seed))
    speed = interval(sides[1].value / sides[0].value, sides[1].draws / sides[0].draws)
    return Change(
        artifact=key[0],
        backend=key[1],
        batch=key[2],
        p50_ms=(before["p50_ms"], now["p50_ms"]),
        speed=speed,
        is_baseline=is_baseline,
        verdict=verdict_of(speed),
    )


def _rounds(row: Mapping[str, Any]) -> list[Sequence[float]]:
    """The samples, round by round."""
    ends = np.cumsum(row["rounds"])
    return [row["samples_ms"][end - size : end] for end, size in zip(ends, row["rounds"], strict=True)]
