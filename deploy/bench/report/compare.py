"""A comparison of two benchmark documents: what became slower or faster."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bench.rows import SCHEMA, UNCERTAIN, verdict_of
from deploy.errors import UsageError
from deploy.evidence.timing import Ratio, bootstrap, interval
from deploy.host.core_probe import APART, SLOW

TOLERANCE = 0.05
"""The share of its speed that a candidate may lose."""

Key = tuple[str, str, int]
"""Artifact, backend, batch."""

_Rounds = list[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One candidate in both documents.

    speed: how many times as fast as before, both relative to the baseline of their own run, so that a change of the machine's
    clock rate does not count; for the baseline itself, by its time. p50_ms: before and now. verdict: `faster` or `slower` where the
    candidate's own time moved the same way, both beyond their intervals; `uncertain` where it did not, for then it is the
    baseline that moved, where one of the runs was disturbed, and where the cores were slower or farther apart in one of them.
    uncertain_because: which of the three.
    """

    artifact: str
    backend: str
    batch: int
    p50_ms: tuple[float, float]
    speed: Ratio
    is_baseline: bool
    verdict: str
    uncertain_because: str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The candidates in both documents, and those in only one of them."""

    changes: tuple[Change, ...]
    only_old: tuple[Key, ...]
    only_new: tuple[Key, ...]
    tolerance: float

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Candidates that lost more than `tolerance` of their speed, and are `slower`."""
        return tuple(
            change
            for change in self.changes
            if not change.is_baseline and change.verdict == "slower" and change.speed.value < 1 - self.tolerance
        )

    @property
    def uncertain(self) -> tuple[Change, ...]:
        """Candidates of which the two runs do not tell whether they became slower."""
        return tuple(change for change in self.changes if change.verdict == UNCERTAIN and not change.is_baseline)

    def to_json(self) -> dict[str, Any]:
        """The document of `deploy bench --compare --json`."""
        return {
            "schema": SCHEMA,
            "tolerance": self.tolerance,
            "changes": [asdict(change) for change in self.changes],
            "uncertain": [[change.artifact, change.backend, change.batch] for change in self.uncertain],
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
    own = _speed([(_rounds(row), None) for row in (before, now)])
    speed = own
    if not is_baseline:
        speed = _speed([(_rounds(row), _rounds(_baseline(rows, key[2]))) for row, rows in ((before, old), (now, new))])
    verdict, because = verdict_of(speed), None
    if disturbed := [(name, row) for name, row in (("old", before), ("new", now)) if not row.get("certain", True)]:
        verdict = UNCERTAIN
        because = "; ".join(f"disturbed in the {name} run: {row['uncertain_because']}" for name, row in disturbed)
    elif verdict != "no difference" and (moved := _moved(before, now)):
        verdict, because = UNCERTAIN, moved
    elif verdict not in ("no difference", verdict_of(own)):
        verdict = UNCERTAIN
        because = "its own time did not move the same way: the baseline did, or was disturbed in one of the runs"
    return Change(
        artifact=key[0],
        backend=key[1],
        batch=key[2],
        p50_ms=(before["p50_ms"], now["p50_ms"]),
        speed=speed,
        is_baseline=is_baseline,
        verdict=verdict,
        uncertain_because=because,
    )


def _moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """That the cores were slower or farther apart in one of the runs, in words; None if they were not, or nobody knows."""
    said = []
    for key, limit, what in (("step_ns", SLOW, "ns for a step of a loop"), ("handoff_us", APART, "us from core to core")):
        old, new = before.get(key), now.get(key)
        if old is not None and new is not None and max(old, new) > limit * min(old, new):
            said.append(f"{old:.3g} {what} in the old run and {new:.3g} in the new one")
    return f"the cores were not alike: {', '.join(said)}" if said else None


def _baseline(rows: Mapping[Key, Mapping[str, Any]], batch: int) -> Mapping[str, Any]:
    return next(other for other in rows.values() if other["verdict"] == "baseline" and other["batch"] == batch)


def _speed(runs: Sequence[tuple[_Rounds, _Rounds | None]]) -> Ratio:
    """How many times as fast the second run is as the first, each the rounds of a candidate and those of its baseline, if any."""
    sides = [bootstrap(baseline or [[1.0]] * len(rounds), rounds, seed=seed) for seed, (rounds, baseline) in enumerate(runs)]
    return interval(sides[1].value / sides[0].value, sides[1].draws / sides[0].draws)


def _rounds(row: Mapping[str, Any]) -> _Rounds:
    """The samples, round by round."""
    ends = np.cumsum(row["rounds"])
    return [row["samples_ms"][end - size : end] for end, size in zip(ends, row["rounds"], strict=True)]
