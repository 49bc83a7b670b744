"""What became slower or faster between two documents."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.bench.report.compare import Comparison, compare_files
from deploy.bench.report.table import print_comparison
from deploy.bench.rows import SCHEMA
from deploy.errors import UsageError


def row(backend: str, p50_ms: float, seed: int, batch: int = 1) -> dict[str, Any]:
    samples = (p50_ms * np.random.default_rng(seed).normal(1, 0.01, 60)).round(6).tolist()
    verdict = "baseline" if backend == "eager" else "faster"
    return {
        "artifact": "build/net", "backend": backend, "batch": batch, "p50_ms": float(np.median(samples)), "verdict": verdict, "certain": True,
        "samples_ms": samples, "rounds": [12] * 5,
    }  # fmt: skip


def document(eager: float, fast: float, seed: int) -> dict[str, Any]:
    return {"schema": SCHEMA, "baseline": "eager", "results": [row("eager", eager, seed), row("onnxruntime", fast, seed + 1)]}


def compare(folder: Path, old: dict[str, Any], new: dict[str, Any], tolerance: float = 0.05) -> Comparison:
    for name, content in (("old", old), ("new", new)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return compare_files(folder / "old.json", folder / "new.json", tolerance)


def shown(found: Comparison) -> str:
    file = io.StringIO()
    print_comparison(found, file)
    return file.getvalue()


def test_a_slower_candidate_is_a_regression(tmp_path: Path) -> None:
    found = compare(tmp_path, document(10, 2, 0), document(10, 2.4, 9))
    eager, fast = found.changes
    assert eager.verdict == "no difference"
    assert (fast.verdict, found.regressions) == ("slower", (fast,))
    assert fast.speed.value == pytest.approx(2 / 2.4, rel=0.02)
    assert fast.speed.low < fast.speed.value < fast.speed.high < 0.95
    assert "regression" in shown(found)
    assert "1 candidate lost more than 5% of its speed" in shown(found)
    assert not compare(tmp_path, document(10, 2, 0), document(10, 2.4, 9), tolerance=0.3).regressions
    assert json.loads(json.dumps(found.to_json()))["regressions"] == [["build/net", "onnxruntime", 1]]


def test_what_the_baseline_alone_did_is_no_change_of_the_candidate(tmp_path: Path) -> None:
    for old, new in ((document(10, 2, 0), document(30, 2, 9)), (document(30, 2, 0), document(10, 2, 9))):
        found = compare(tmp_path, old, new)
        assert found.changes[1].verdict == "uncertain"
        assert "its own time did not move the same way" in str(found.changes[1].uncertain_because)
        assert (found.regressions, found.uncertain) == ((), found.changes[1:])
        said = " ".join(shown(found).split())
        assert "do not tell whether 1 candidate became slower" in said
        assert "None lost more" not in said
        assert "regression" not in said
        assert json.loads(json.dumps(found.to_json()))["uncertain"] == [["build/net", "onnxruntime", 1]]


def test_a_disturbed_run_is_marked_and_no_verdict_is_drawn_from_it(tmp_path: Path) -> None:
    old, new = document(10, 2, 0), document(10, 2.4, 9)
    old["results"][1] |= {"certain": False, "uncertain_because": "other programs used 0.9 of 2 cores"}
    found = compare(tmp_path, old, new)
    assert (found.changes[1].verdict, found.regressions) == ("uncertain", ())
    assert "Uncertain: disturbed in the old run: other programs used 0.9 of 2 cores." in " ".join(shown(found).split())


@pytest.mark.parametrize(
    ("key", "old", "new", "said"),
    [
        ("handoff_us", 0.16, 0.34, "0.16 us from core to core in the old run and 0.34 in the new one"),
        ("handoff_us", 0.34, 0.16, "0.34 us from core to core in the old run and 0.16 in the new one"),
        ("step_ns", 10.9, 18.1, "10.9 ns for a step of a loop in the old run and 18.1 in the new one"),
        ("handoff_us", 0.16, 0.18, None),
        ("step_ns", 9.8, 10.9, None),
        ("step_ns", None, 18.1, None),
    ],
)
def test_cores_that_were_not_alike_in_the_runs_leave_it_open(
    tmp_path: Path, key: str, old: float, new: float, said: str | None
) -> None:
    documents = document(10, 2, 0), document(10, 2.4, 9)
    for made, value in zip(documents, (old, new), strict=True):
        made["results"][1][key] = value
    found = compare(tmp_path, *documents)
    assert found.changes[1].verdict == ("slower" if said is None else "uncertain")
    assert said is None or f"Uncertain: the cores were not alike: {said}." in " ".join(shown(found).split())


def test_a_slower_machine_is_none(tmp_path: Path) -> None:
    found = compare(tmp_path, document(10, 2, 0), document(15, 3, 9))
    eager, fast = found.changes
    assert (eager.verdict, eager.speed.value) == ("slower", pytest.approx(10 / 15, rel=0.02))
    assert fast.verdict == "no difference"
    assert not found.regressions
    assert "None lost more than 5% of its speed." in shown(found)


def test_a_faster_candidate_is_said_to_be_faster(tmp_path: Path) -> None:
    found = compare(tmp_path, document(10, 2, 0), document(10, 1.5, 9))
    assert found.changes[1].verdict == "faster"


def test_what_is_in_one_document_only_is_listed(tmp_path: Path) -> None:
    old, new = document(10, 2, 0), document(10, 2, 9)
    old["results"].append(row("openvino", 3, 4))
    new["results"] += [row("eager", 20, 5, batch=8), row("compile", 3, 4, batch=8)]
    found = compare(tmp_path, old, new)
    assert found.only_old == (("build/net", "openvino", 1),)
    assert found.only_new == (("build/net", "eager", 8), ("build/net", "compile", 8))
    assert "Only in the old: build/net on openvino, batch 1" in shown(found)


def test_documents_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    good = document(10, 2, 0)
    for change, message in (
        ({"baseline": "onnxruntime"}, "measured against eager and .* against onnxruntime"),
        ({"schema": 1}, "has schema 1; this version compares schema 3"),
        ({"results": []}, "no artifact, backend and batch size in common"),
    ):
        with pytest.raises(UsageError, match=message):
            compare(tmp_path, good, {**copy.deepcopy(good), **change})
    with pytest.raises(UsageError, match=r"cannot read .*: No such file"):
        compare_files(tmp_path / "none.json", tmp_path / "old.json")
    (tmp_path / "text.json").write_text("text")
    with pytest.raises(UsageError, match="is not JSON"):
        compare_files(tmp_path / "text.json", tmp_path / "old.json")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(UsageError, match="not a document of"):
        compare_files(tmp_path / "other.json", tmp_path / "old.json")
    with pytest.raises(UsageError, match="`tolerance` must be 0 or more"):
        compare(tmp_path, good, good, tolerance=1.5)
