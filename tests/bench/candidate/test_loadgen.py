"""LoadGen over sessions: the real one, its verdicts, and what it says of them."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed
from deploy.bench.candidate import loadgen
from deploy.bench.candidate.loadgen import QUERIES, SCENARIOS, STREAMS, Judged, Scenario, run_scenario
from deploy.errors import BackendError, UsageError
from deploy.runtime.load import open_session
from deploy.runtime.session import Session


class Watched:
    """A session that notes the rows of each run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.concurrency = 2
        self.rows: list[int] = []
        self.lock = threading.Lock()
        self.fail_at: int | None = None

    def run(self, feed: Feed) -> Any:
        with self.lock:
            self.rows.append(len(feed["input"]))
            if self.fail_at is not None and len(self.rows) > self.fail_at:
                raise BackendError("the session broke")
        return self._session.run(feed)


@pytest.fixture
def watched(shared_lenet5: Artifact) -> Any:
    with open_session(shared_lenet5, "onnxruntime") as session:
        yield Watched(session)


def feeds(count: int = 8) -> list[Feed]:
    rng = np.random.default_rng(0)
    return [{"input": rng.standard_normal((1, 1, 28, 28), dtype=np.float32)} for _ in range(count)]


def judge(session: Any, folder: Path, scenario: Scenario, most_rows: int = 6, seconds: float = 0.3) -> Judged:
    return run_scenario(session, scenario, feeds(), most_rows=most_rows, run_s=1e-4, seconds=seconds, folder=folder)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_is_judged_by_loadgen_and_leaves_its_logs(watched: Any, tmp_path: Path, name: str) -> None:
    targets = {"target_qps": 1000.0, "target_ms": 200.0} if name == "server" else {}
    found = judge(watched, tmp_path / "logs", Scenario(name=name, **targets), seconds=1.0 if name == "server" else 0.3)
    assert found.valid, found
    assert found.reasons == ()
    assert found.queries >= QUERIES[name]
    assert found.value > 0
    assert found.unit == ("samples/s" if name in ("server", "offline") else "ms")
    assert 0 < found.p50_ms <= found.p90_ms <= found.p99_ms <= found.p999_ms
    summary = (tmp_path / "logs" / "mlperf_log_summary.txt").read_text()
    assert "Result is : VALID" in summary
    if name == "single-stream":
        assert f"90.0th percentile latency (ns) : {found.value * 1e6:.0f}" in summary
        assert set(watched.rows[-60:]) == {1}
    if name == "offline":
        assert f"Samples per second: {found.value:g}" in summary
        assert set(watched.rows[20:-3]) == {4}  # the largest power of two in 6
    if name == "multi-stream":
        assert sum(watched.rows[-2:]) == STREAMS


def test_a_limit_that_is_not_kept_is_invalid_with_the_reasons(watched: Any, tmp_path: Path) -> None:
    found = judge(watched, tmp_path, Scenario(name="server", target_qps=800.0, target_ms=0.001))
    assert not found.valid
    assert "performance constraints not satisfied" in found.reasons
    assert any("Reduce target QPS" in reason for reason in found.reasons)


def test_too_few_queries_in_the_time_there_is_are_invalid(watched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadgen, "LIMIT_S", 0.02)
    found = judge(watched, tmp_path, Scenario(name="multi-stream"), seconds=0.01)
    assert not found.valid
    assert "min queries not satisfied" in found.reasons
    assert any(reason.startswith("Need to process at least 662 queries") for reason in found.reasons)


@pytest.mark.parametrize("name", ["offline", "server"])
def test_an_error_of_the_session_is_raised_after_the_test(watched: Any, tmp_path: Path, name: str) -> None:
    watched.fail_at = 20
    targets = {"target_qps": 1000.0, "target_ms": 100.0} if name == "server" else {}
    with pytest.raises(BackendError, match="the session broke"):
        judge(watched, tmp_path, Scenario(name=name, **targets))
    assert len(watched.rows) < 30


def test_logs_of_another_kind_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "mlperf_log_detail.txt").write_text(':::MLLOG {"key": "other", "value": 1}\n')
    (tmp_path / "mlperf_log_summary.txt").write_text("")
    with pytest.raises(BackendError, match="cannot read LoadGen's logs"):
        loadgen.read_logs(tmp_path, "offline")


@pytest.mark.parametrize(
    "candidates",
    [
        [("build/net", "onnxruntime"), ("old/net", "onnxruntime"), ("/tmp/net", "onnxruntime"), ("net", "onnxruntime")],
        [("a/net:v1", "null"), ("a/net-v1", "null"), ("b/net:v1", "null")],
        [("net", "onnxruntime:cuda"), ("net-onnxruntime", "cuda"), ("net", "onnxruntime-cuda")],
        [("a/net", "null"), ("b/net", "null"), ("a/net-null-2", "null"), ("a/net", "null-2")],
        [("a/net", "null"), ("a/net-null", "2"), ("b/net", "null")],
        [(".", "null"), ("..", "null"), ("/", "null")],
    ],
)
def test_every_candidate_has_a_folder_to_itself(candidates: list[tuple[str, str]]) -> None:
    names = loadgen.folder_names(candidates)
    assert len({f"{name}-{scenario}" for name in names for scenario in SCENARIOS}) == len(candidates) * len(SCENARIOS)
    assert all(name == Path(name).name for name in names)
    assert names[0] == f"{Path(candidates[0][0]).name}-{candidates[0][1]}".replace(":", "-")


def test_artifacts_of_one_base_name_do_not_share_logs(run: Any, lenet5: Artifact, tmp_path: Path) -> None:
    shutil.copytree(lenet5.path, tmp_path / "other" / "lenet5")
    done = run(
        "bench", lenet5.path, tmp_path / "other" / "lenet5", "--backend", "null", "--batch", "1", "--seconds", "0.1",
        "--load-seconds", "0.1", "--scenario", "offline", "--baseline", "onnxruntime", "--logs", tmp_path / "logs", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "r.json").read_text())["scenarios"]
    assert [Path(row["logs"]).name for row in rows] == [
        "lenet5-onnxruntime-offline",
        "lenet5-null-offline",
        "lenet5-null-2-offline",
    ]
    assert all((Path(row["logs"]) / "mlperf_log_summary.txt").is_file() for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "batch"}, "unknown scenario 'batch'"),
        ({"name": "offline", "target_qps": 3.0}, "`target_qps` is only for `scenarios` server"),
        ({"name": "server", "target_ms": 0.0}, "`target_ms` must be more than 0"),
    ],
)
def test_scenarios_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Scenario(**options)


def test_without_loadgen_it_is_said_how_to_get_it(run: Any, lenet5: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    done = run("bench", lenet5.path, "--scenario", "offline")
    assert done.status == 1
    assert "pip install 'deploy[loadgen]'" in done.err


def test_the_command_judges_all_candidates_under_the_same_targets(run: Any, lenet5: Artifact, tmp_path: Path) -> None:
    done = run(
        "bench", lenet5.path, "--baseline", "onnxruntime", "--backend", "openvino", "--batch", "1,4", "--seconds", "0.5", "--load-seconds", "0.3",
        "--scenario", "offline,server", "--logs", tmp_path / "logs", "--json", tmp_path / "r.json", "--layers",
    )  # fmt: skip
    assert done.status == 0, done.err
    document = json.loads((tmp_path / "r.json").read_text())
    rows = document["scenarios"]
    assert [(row["backend"], row["scenario"]) for row in rows] == [
        ("onnxruntime", "offline"), ("openvino", "offline"), ("onnxruntime", "server"), ("openvino", "server"),
    ]  # fmt: skip
    assert len({(row["target_qps"], row["target_ms"]) for row in rows[2:]}) == 1
    for row in rows:
        assert "Result is" in (Path(row["logs"]) / "mlperf_log_summary.txt").read_text()
    assert "verdict" in done.out
    assert str(tmp_path / "logs") in done.out
    assert [row["backend"] for row in document["layers"]] == ["onnxruntime", "openvino"]
    assert "lenet5 on onnxruntime, batch 1: " in done.out
    assert all(len(line) <= 100 for line in done.out.splitlines())
