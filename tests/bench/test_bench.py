import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact
from deploy.bench.bench import bench
from deploy.bench.candidate.process import CandidateProcess
from deploy.bench.options import BenchOptions
from deploy.bench.rows import SCHEMA, BenchResult, BenchRow
from deploy.bench.run import MIN_ROUNDS
from deploy.errors import ArtifactError, BackendError, UsageError
from tests.processors import processors

QUICK = BenchOptions(batches=(1, 4), seconds=0.4, threads=2)

NO_TORCH: dict[str, Any] = {"baseline": "onnxruntime", "seconds": 0.2}
"""For what does not depend on the baseline: a process that loads torch takes seconds."""


@pytest.fixture(scope="module")
def result(shared_lenet5: Artifact, half: Artifact, engine: Artifact) -> BenchResult:
    with processors():
        return bench([shared_lenet5, half, engine], QUICK, named=False)


def rows(result: BenchResult, backend: str, batch: int = 1) -> list[BenchRow]:
    return [row for row in result.results if row.backend == backend and row.batch == batch]


def test_the_document_has_the_keys_of_the_contract_and_is_json(result: BenchResult) -> None:
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(document) == {
        "schema",
        "baseline",
        "interrupted",
        "conditions",
        "results",
        "loads",
        "scenarios",
        "layers",
        "artifacts",
        "skipped",
    }
    assert (document["schema"], document["baseline"], document["interrupted"]) == (SCHEMA, "eager", False)
    for row in document["results"]:
        assert list(row) == [
            "artifact", "precision", "backend", "batch", "p50_ms", "p90_ms", "p99_ms", "p999_ms", "mean_ms", "images_per_s",
            "speedup", "speedup_low", "speedup_high", "verdict", "certain", "uncertain_because", "others_cores", "waited_share", "step_ns", "handoff_us",
            "max_abs_error", "first_ms", "load_s", "peak_bytes", "gpu_bytes", "size_bytes", "top1", "top5", "accuracy_from", "score",
            "gflops", "roof_gflops", "gpu_ms", "h2d_ms", "d2h_ms", "samples_ms", "rounds",
        ]  # fmt: skip
    for entry in document["skipped"]:
        assert list(entry) == ["artifact", "backend", "reason"]


def test_the_conditions_name_the_machine_and_the_libraries(result: BenchResult) -> None:
    found = result.conditions
    assert set(found) == {
        "time", "platform", "cpu", "cores", "cpu_limit", "threads", "cache_bytes", "governor", "device", "load_average", "load_average_after",
        "gpu", "gpu_during", "revision", "versions", "inputs", "peak", "disturbance",
    }  # fmt: skip
    assert found["threads"] == 2
    assert {"python", "deploy", "torch", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"} == set(found["versions"])
    assert all(version for name, version in found["versions"].items() if name != "tensorrt")
    assert found["inputs"]["from"] == "random"
    for batch in ("1", "4"):
        assert found["inputs"]["by_batch"][batch]["inputs"] > 1


def test_eager_is_measured_once_and_everything_else_against_it(
    result: BenchResult, shared_lenet5: Artifact, half: Artifact
) -> None:
    for batch in (1, 4):
        (eager,) = rows(result, "eager", batch)
        assert (eager.artifact, eager.precision) == (shared_lenet5.shown, "fp32")
        assert (eager.speedup, eager.speedup_low, eager.speedup_high, eager.max_abs_error) == (1, 1, 1, 0)
        for backend in ("onnxruntime", "openvino"):
            found = {(row.artifact, row.precision) for row in rows(result, backend, batch)}
            assert found == {(shared_lenet5.shown, "fp32"), (half.shown, "fp16")}


def test_what_is_reached_is_set_beside_what_the_machine_allows(result: BenchResult) -> None:
    peak = result.conditions["peak"]
    assert peak["gflops"] > 1
    assert peak["gbytes_per_s"] > 0.5
    for row in result.results:
        assert row.gflops is not None
        assert row.roof_gflops is not None
        assert row.gflops == pytest.approx(2 * 416_520 * row.batch / row.p50_ms / 1e6, rel=1e-6)  # lenet5's multiply-accumulates
        assert 0 < row.roof_gflops <= peak["gflops"]


def test_errors_are_those_of_the_precision(result: BenchResult) -> None:
    for row in result.results:
        if row.backend != "eager":
            low, high = {"fp32": (0, 1e-5), "fp16": (1e-6, 1e-2)}[row.precision]
            assert row.max_abs_error is not None
            assert low < row.max_abs_error < high, row


def test_the_figures_of_a_row_agree_with_its_samples(result: BenchResult) -> None:
    for row in result.results:
        assert len(row.samples_ms) >= MIN_ROUNDS
        assert min(row.samples_ms) <= row.p50_ms <= row.p90_ms <= row.p99_ms <= row.p999_ms <= max(row.samples_ms)
        assert sum(row.rounds) == len(row.samples_ms)
        mean = sum(row.samples_ms) / len(row.samples_ms)
        assert row.mean_ms == pytest.approx(mean, rel=1e-3)
        assert row.first_ms > 0
        assert 0 < row.load_s < 60
        assert 30e6 < row.peak_bytes < 4e9
        assert row.gpu_bytes is None
        spans = row.speedup_low <= 1 <= row.speedup_high
        expected = (
            "baseline" if row.backend == "eager" else "no difference" if spans else "faster" if row.speedup > 1 else "slower"
        )
        assert row.verdict == expected
        assert row.images_per_s == pytest.approx(row.batch / mean * 1000, rel=1e-3)
        assert row.speedup_low <= row.speedup <= row.speedup_high


def test_an_engine_that_was_found_is_skipped_with_the_reason(result: BenchResult, engine: Artifact) -> None:
    (entry,) = result.skipped
    assert entry.artifact == engine.shown
    assert "NVIDIA GPU" in entry.reason
    assert not result.failed


def test_candidates_take_turns_in_an_order_that_rotates_and_progress_is_told(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    ask = CandidateProcess.round

    def spy(self: CandidateProcess, seconds: float, most: int) -> list[float]:
        order.append(self.label.rpartition(" ")[2])
        return ask(self, seconds, most)

    monkeypatch.setattr(CandidateProcess, "round", spy)
    told: list[tuple[str, int, int]] = []
    options = BenchOptions(baseline="openvino", batches=(1,), backends=("onnxruntime", "null"), seconds=0.2)
    bench([shared_lenet5], options, progress=lambda what, done=0, total=0, /: told.append((what, done, total)))
    assert any(what == "batch 1" and 0 < done < total for what, done, total in told)
    turns = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(turn) == ["null", "onnxruntime", "openvino"] for turn in turns)
    assert [turn[0] for turn in turns[:4]] == ["openvino", "onnxruntime", "null", "openvino"]


def kill_in_round(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    ask = CandidateProcess.round

    def fatal(self: CandidateProcess, seconds: float, most: int) -> list[float]:
        if self.label.endswith(f" on {backend}"):
            os.kill(self.pid, signal.SIGKILL)
        return ask(self, seconds, most)

    monkeypatch.setattr(CandidateProcess, "round", fatal)


def test_on_a_busy_machine_rounds_are_taken_again_and_no_verdict_is_drawn(shared_lenet5: Artifact) -> None:
    options = BenchOptions(baseline="onnxruntime", batches=(1,), backends=("null",), seconds=0.2, threads=1)
    told: list[str] = []
    with processors(waiting=0.5):
        found = bench([shared_lenet5], options, progress=lambda what, done=0, total=0, /: told.append(what))
    assert [(row.verdict, row.certain) for row in found.results] == [("baseline", False), ("uncertain", False)]
    null = found.results[1]
    assert null.uncertain_because is not None
    assert re.search(r"threads waited for a core in [45]\d% of the time", null.uncertain_because)
    assert null.waited_share == pytest.approx(0.5, rel=0.2)
    assert null.speedup_low < 0.5 * null.speedup  # the baseline may have taken a third of the time
    assert null.speedup_high > 2 * null.speedup
    assert "batch 1, disturbed: again" in told
    assert found.conditions["disturbance"]["repeated_rounds"] > 0
    assert found.conditions["disturbance"]["not_measured"] == []
    json.dumps(found.to_json(), allow_nan=False)


def test_a_candidate_that_dies_is_reported_and_the_others_finish(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_in_round(monkeypatch, "openvino")
    result = bench([shared_lenet5], replace(QUICK, baseline="onnxruntime"))
    assert result.failed
    (failure,) = result.failures
    assert failure.backend == "openvino"
    assert "killed by signal 9" in failure.reason
    assert {(row.backend, row.batch) for row in result.results} == {("onnxruntime", batch) for batch in (1, 4)}
    assert result.to_json()["skipped"][0]["backend"] == "openvino"


def test_a_baseline_that_dies_is_an_error(shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_in_round(monkeypatch, "eager")
    with pytest.raises(BackendError, match=r"lenet5 on eager died \(killed by signal 9"):
        bench([shared_lenet5], BenchOptions(batches=(1,), backends=("null",), seconds=0.2))


def hide(monkeypatch: pytest.MonkeyPatch, library: str, folder: str) -> None:
    """Put a module of that name that cannot be imported before the installed one, for the workers."""
    with open(os.path.join(folder, f"{library}.py"), "w", encoding="utf-8") as file:
        file.write("raise ImportError('not here')")
    monkeypatch.setattr(sys, "path", [folder, *sys.path])


def test_backends_that_are_not_installed_are_skipped_unless_they_or_the_artifact_were_named(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    hide(monkeypatch, "onnxruntime", str(tmp_path))
    hide(monkeypatch, "openvino", str(tmp_path))
    found = bench([shared_lenet5], BenchOptions(batches=(1,), seconds=0.2), named=False)
    assert [row.backend for row in found.results] == ["eager"]
    assert [entry.backend for entry in found.skipped] == ["onnxruntime", "openvino"]
    assert all("pip install 'deploy[cpu]'" in entry.reason for entry in found.skipped)
    assert not found.failed
    with pytest.raises(BackendError, match="openvino cannot be imported"):
        bench([shared_lenet5], BenchOptions(batches=(1,), backends=("openvino", "null"), baseline="null"), named=False)
    with pytest.raises(BackendError, match=r"no backend can run .*lenet5 here: onnxruntime: .*cannot be imported"):
        bench([shared_lenet5], BenchOptions(batches=(1,)))


def test_another_baseline_and_what_is_no_difference(shared_lenet5: Artifact) -> None:
    with processors():
        found = bench([shared_lenet5], BenchOptions(baseline="onnxruntime", backends=("null",), batches=(2,), seconds=0.3))
    assert found.baseline == "onnxruntime"
    assert [(row.backend, row.verdict) for row in found.results] == [("onnxruntime", "baseline"), ("null", "faster")]
    with pytest.raises(UsageError, match="an engine or a package cannot be the baseline"):
        BenchOptions(baseline="tensorrt")


def test_a_bare_file_is_compared_with_another_backend_where_there_is_no_module(tiny_onnx: Path) -> None:
    bare = deploy.open_artifact(tiny_onnx)
    with pytest.raises(ArtifactError, match="or name another `baseline`, such as onnxruntime"):
        bench([bare], QUICK)
    found = bench([bare], BenchOptions(baseline="onnxruntime", backends=("openvino",), batches=(1,), seconds=0.2))
    assert [row.backend for row in found.results] == ["onnxruntime", "openvino"]


def test_a_named_backend_that_is_missing_is_an_error_unless_it_may_be(shared_lenet5: Artifact) -> None:
    names = ("onnxruntime:cuda", "tensorrt", "null")
    with pytest.raises(BackendError, match="tensorrt runs engines, and no artifact here is one of its"):
        bench([shared_lenet5], BenchOptions(backends=names, batches=(1,), **NO_TORCH))
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        bench([shared_lenet5], BenchOptions(backends=("onnxruntime:cuda", "null"), batches=(1,), **NO_TORCH))
    found = bench([shared_lenet5], BenchOptions(backends=names, batches=(1,), skip_missing=True, **NO_TORCH))
    assert [row.backend for row in found.results] == ["onnxruntime", "null"]
    assert sorted(entry.backend for entry in found.skipped) == ["onnxruntime:cuda", "tensorrt"]
    assert not found.failed


def test_accuracy_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    artifact = deploy.export(tmp_path / "net", arch="lenet5")
    for label in range(10):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        pixels = np.random.default_rng(label).integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / str(label) / "1.png")
    options = BenchOptions(
        backends=("openvino",), batches=(1,), evaluate=tmp_path / "images", data=tmp_path / "images", **NO_TORCH
    )
    found = bench([artifact], options)
    assert [(row.accuracy_from, row.top5 is not None) for row in found.results] == [("measured", True)] * 2
    assert found.results[0].top1 == found.results[1].top1
    assert found.conditions["inputs"]["from"] == str(tmp_path / "images")


def test_ctrl_c_keeps_what_was_measured(shared_lenet5: Artifact) -> None:
    told: list[str] = []

    def interrupt(what: str, done: int = 0, total: int = 0, /) -> None:
        told.append(what)
        if what == "batch 4" and done == 2:
            raise KeyboardInterrupt

    found = bench([shared_lenet5], BenchOptions(backends=("null",), batches=(1, 4), **NO_TORCH), progress=interrupt)
    assert found.interrupted
    assert {row.batch for row in found.results} == {1}
    assert found.to_json()["interrupted"]

    def at_once(what: str, done: int = 0, total: int = 0, /) -> None:
        if what == "batch 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench([shared_lenet5], BenchOptions(backends=("null",), batches=(1,), **NO_TORCH), progress=at_once)
