import json
import logging
import os
import re
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX, Target
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import ArtifactError, BackendError, UsageError
from deploy.evidence.disturbance import Measured, Round, Turn, Use
from deploy.host.cpu import physical_cores
from deploy.runtime import fastest
from deploy.runtime.fastest import fastest_file
from deploy.runtime.load import load
from deploy.runtime.worker.process import WorkerProcess
from tests.processors import processors


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deploy" / "fastest.json"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the artifacts that were timed; OpenVINO always wins."""
    names: list[str] = []

    use = Use(seconds=1.0, cores=2, threads=2, others_s=0.0, stolen_s=0.0, step_s=0.01, waited_s=0.0)
    turns = {name: Turn(samples_s=[seconds], use=use) for name, seconds in (("onnxruntime", 2.0), ("openvino", 1.0))}

    def time_them(artifact: Artifact, backends: object, options: object, dims: object) -> Measured[str]:
        names.append(artifact.manifest.name)
        return Measured([Round(turns)] * 5, quiet=True)

    monkeypatch.setattr(fastest, "_time", time_them)
    return names


def test_a_directory_a_file_or_an_artifact_can_be_loaded(shared_lenet5: Artifact) -> None:
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32)
    results = []
    for what in (shared_lenet5, shared_lenet5.path, str(shared_lenet5.path), shared_lenet5.path / ONNX):
        with deploy.load(what) as session:
            assert session.backend == "onnxruntime"
            results.append(session(x))
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_options_reach_the_backend(shared_lenet5: Artifact) -> None:
    with load(shared_lenet5, "onnxruntime", threads=3) as session:
        assert session._session.get_session_options().intra_op_num_threads == 3  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="not on cuda"):
        load(shared_lenet5, "openvino", "cuda")
    with pytest.raises(BackendError, match="not in fp16"):
        load(shared_lenet5, "onnxruntime", compute="fp16")
    with pytest.raises(UsageError, match="unknown device"):
        load(shared_lenet5, device="gpu")


def test_nothing_to_load_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"no artifact at {tmp_path / 'missing'}"):
        load(tmp_path / "missing")


@pytest.mark.parametrize("what", [None, 123, b"build/net", ["build/net"]])
def test_what_is_no_path_is_an_error_that_says_what_was_expected(what: object) -> None:
    with pytest.raises(UsageError, match=rf"expected an artifact, or the path of one .*, not {re.escape(repr(what))}"):
        load(what)  # type: ignore[arg-type]


def resizable(tmp_path: Path, preprocess: Preprocess | None) -> Artifact:
    """y = x, for images of any size, without a profile."""
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 1, h, w] x) => (float[n, 1, h, w] y) { y = Relu(x) }"""
    with ArtifactWriter(tmp_path / "any") as writer:
        onnx.save(onnx.parser.parse_model(text), writer.path / ONNX)
        manifest = open_onnx(writer.path / ONNX).manifest
        return writer.commit(msgspec.structs.replace(manifest, name="any", preprocess=preprocess))


def test_dynamic_images_are_timed_at_the_size_of_the_preprocessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = resizable(tmp_path, Preprocess(channels=1, crop=(6, 8)))
    asked: list[object] = []
    prepare = WorkerProcess.prepare
    monkeypatch.setattr(WorkerProcess, "prepare", lambda self, dims: asked.append(dims) or prepare(self, dims))
    with load(artifact, "fastest") as session:
        assert session.dims() == {"n": 1, "h": 6, "w": 8}
        session.warmup()
    assert asked == [{"n": 1, "h": 6, "w": 8}] * 2


def test_fastest_says_which_dimension_has_no_size(tmp_path: Path) -> None:
    artifact = resizable(tmp_path, Preprocess(channels=1))
    with pytest.raises(UsageError, match=r"x: float32 nx1xhxw: .* gives 'h' a size: name a backend in place of fastest"):
        load(artifact, "fastest")


def test_fastest_times_the_candidates_once_in_processes_of_their_own(
    shared_lenet5: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fastest_file() == cache
    with processors(), load(shared_lenet5, "fastest") as session:
        chosen = session.backend
    (entry,) = json.loads(cache.read_text(encoding="utf-8")).values()
    assert set(entry["p50_ms"]) == {"onnxruntime", "openvino"}
    assert chosen == min(entry["p50_ms"], key=entry["p50_ms"].get) == entry["backend"]
    assert entry["artifact"] == shared_lenet5.manifest.digest
    monkeypatch.setattr(WorkerProcess, "__init__", lambda *_: pytest.fail("timed again"))
    with load(shared_lenet5, "fastest") as session:
        assert session.backend == chosen


def test_on_a_busy_machine_the_first_of_the_order_is_taken_with_a_warning_and_not_remembered(
    shared_lenet5: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fastest, "_SLICE_S", 0.02)
    monkeypatch.setattr(fastest, "auto_order", lambda artifact: ("openvino", "onnxruntime"))
    cores = physical_cores()
    busy = processors(others=len(os.sched_getaffinity(0)))
    with busy, caplog.at_level(logging.WARNING), load(shared_lenet5, "fastest") as session:
        assert session.backend == "openvino"
    assert f"which backend is fastest for {shared_lenet5.shown} cannot be measured now: other programs used" in caplog.text
    assert f"of {cores} core" in caplog.text
    assert "openvino is taken, the first in the order of auto" in caplog.text
    assert not cache.exists()


def test_the_fastest_is_the_one_with_the_lowest_time(shared_lenet5: Artifact, timed: list[str]) -> None:
    with load(shared_lenet5, "fastest") as session:
        assert session.backend == "openvino"


def test_other_circumstances_are_timed_again(
    shared_lenet5: Artifact, lenet5: Artifact, timed: list[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    load(shared_lenet5, "fastest").close()
    load(lenet5, "fastest").close()  # another place, the same digest
    assert len(timed) == 1
    load(shared_lenet5, "fastest", threads=1).close()
    assert len(timed) == 2
    monkeypatch.setattr(fastest, "cpu_model", lambda: "another")
    load(shared_lenet5, "fastest").close()
    assert len(timed) == 3
    assert len(json.loads(cache.read_text(encoding="utf-8"))) == 3


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"key": 3}'])
def test_a_damaged_file_is_measured_again(shared_lenet5: Artifact, timed: list[str], cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content, encoding="utf-8")
    for _ in range(2):
        with load(shared_lenet5, "fastest") as session:
            assert session.backend == "openvino"
    assert len(timed) == 1


def test_an_entry_with_another_backend_is_measured_again(shared_lenet5: Artifact, timed: list[str], cache: Path) -> None:
    load(shared_lenet5, "fastest").close()
    content = json.loads(cache.read_text(encoding="utf-8"))
    cache.write_text(json.dumps({key: entry | {"backend": "eager"} for key, entry in content.items()}), encoding="utf-8")
    with load(shared_lenet5, "fastest") as session:
        assert session.backend == "openvino"
    assert len(timed) == 2


def test_a_choice_that_cannot_be_kept_still_holds_and_a_warning_says_so(
    shared_lenet5: Artifact, timed: list[str], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.write_text("a file where the cache should be", encoding="utf-8")
    with caplog.at_level(logging.WARNING), load(shared_lenet5, "fastest") as session:
        assert session.backend == "openvino"
    assert f"cannot be kept in {cache}" in caplog.text


def test_fastest_says_why_when_no_backend_can_run_the_artifact(shared_lenet5: Artifact) -> None:
    with pytest.raises(BackendError, match=r"no backend can run .*: onnxruntime: .*cuda; openvino: .*cuda"):
        load(shared_lenet5, "fastest", device="cuda")


@pytest.mark.parametrize("backend", ["auto", "fastest", "onnxruntime"])
def test_an_engine_is_refused(shared_lenet5: Artifact, tmp_path: Path, backend: str) -> None:
    with ArtifactWriter(tmp_path / "engine") as writer:
        (writer.path / ENGINE).write_bytes(b"plan")
        target = Target(flavour="tensorrt", version="10.16", gpu=None, compute_capability=None, targets=[])
        engine = writer.commit(msgspec.structs.replace(shared_lenet5.manifest, kind="engine", target=target))
    with pytest.raises(BackendError, match=r"is a tensorrt engine: it runs on an NVIDIA GPU"):
        load(engine, backend)
