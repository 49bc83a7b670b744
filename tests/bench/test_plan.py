import logging
import shutil
from pathlib import Path

import msgspec
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.writer import ArtifactWriter
from deploy.bench.options import BenchOptions
from deploy.bench.plan import BATCHES, find_artifacts, make_plan
from deploy.errors import ArtifactError, BackendError, UsageError
from deploy.runtime.catalog import Backend


def remake(artifact: Artifact, out: Path, **changes: object) -> Artifact:
    """A copy of `artifact` at `out` whose manifest differs in `changes`."""
    with ArtifactWriter(out) as writer:
        for name in artifact.manifest.files:
            shutil.copy(artifact.path / name, writer.path)
        return writer.commit(msgspec.structs.replace(artifact.manifest, name=out.name, **changes))  # type: ignore[arg-type]


def test_every_artifact_meets_every_cpu_backend_and_eager_is_the_baseline(shared_lenet5: Artifact, half: Artifact) -> None:
    plan = make_plan([half, shared_lenet5], BenchOptions(), named=True)
    assert (plan.baseline.artifact.path, plan.baseline.backend) == (shared_lenet5.path, "eager")
    assert [(each.artifact.path.name, each.backend) for each in plan.candidates] == [
        ("lenet5-half", "onnxruntime"),
        ("lenet5-half", "openvino"),
        ("lenet5", "onnxruntime"),
        ("lenet5", "openvino"),
    ]
    assert all(each.batches == BATCHES for each in (plan.baseline, *plan.candidates))
    assert plan.skipped == ()


def test_an_artifact_named_twice_is_measured_once(shared_lenet5: Artifact) -> None:
    plan = make_plan([shared_lenet5, shared_lenet5], BenchOptions(backends=("null",)), named=True)
    assert len(plan.candidates) == 1


def test_eager_and_compile_run_the_export_once(shared_lenet5: Artifact, half: Artifact) -> None:
    plan = make_plan([half, shared_lenet5], BenchOptions(backends=("eager", "compile")), named=True)
    assert [(each.artifact.path, each.backend) for each in plan.candidates] == [(shared_lenet5.path, "compile")]


def test_without_a_gpu_a_named_engine_is_an_error_and_a_found_one_is_listed(
    shared_lenet5: Artifact, engine: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.bench.plan.has_gpu", lambda: False)
    for backends in ((), ("tensorrt-rtx",)):
        with pytest.raises(BackendError, match=r"lenet5-engine is a tensorrt-rtx engine: it runs on an NVIDIA GPU"):
            make_plan([shared_lenet5, engine], BenchOptions(backends=backends), named=True)
    plan = make_plan([shared_lenet5, engine], BenchOptions(), named=False)
    (entry,) = plan.skipped
    assert (entry.artifact, entry.backend) == (engine.shown, "tensorrt-rtx")
    assert "NVIDIA GPU" in entry.reason
    assert {each.artifact.path for each in plan.candidates} == {shared_lenet5.path}


def test_variants_run_the_artifact_or_the_module_that_it_descends_from(shared_lenet5: Artifact, half: Artifact) -> None:
    backends = ("eager:fp16,channels_last", "eager", "compile:max-autotune", "onnxruntime")
    plan = make_plan([half, shared_lenet5], BenchOptions(backends=backends), named=True)
    assert (plan.baseline.backend, plan.baseline.precision) == ("eager", "fp32")
    assert [(each.artifact.path, each.backend, each.precision) for each in plan.candidates] == [
        (half.path, "onnxruntime", "fp16"),
        (shared_lenet5.path, "onnxruntime", "fp32"),
        (shared_lenet5.path, "eager:fp16,channels_last", "fp16"),
        (shared_lenet5.path, "compile:max-autotune", "fp32"),
    ]


def test_candidates_go_to_the_gpu_where_they_must_and_the_module_goes_with_them(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices(device: str, *backends: str) -> list[str]:
        plan = make_plan([shared_lenet5], BenchOptions(backends=backends, device=device), named=True)
        return [each.device for each in (plan.baseline, *plan.candidates)]

    monkeypatch.setattr("deploy.bench.plan.has_gpu", lambda: True)
    assert devices("auto", "onnxruntime", "eager:fp16") == ["cpu", "cpu", "cpu"]
    assert devices("auto", "onnxruntime", "onnxruntime:cuda", "eager:fp16") == ["cuda", "cpu", "cuda", "cuda"]
    assert devices("auto", "eager:cuda_graph") == ["cuda", "cuda"]
    assert devices("cuda:1", "onnxruntime") == ["cuda:1", "cuda:1"]
    monkeypatch.setattr("deploy.bench.plan.has_gpu", lambda: False)
    assert devices("auto", "onnxruntime:cuda", "compile") == ["cpu", "cuda", "cpu"]


def test_an_engine_runs_on_its_flavour_where_there_is_a_gpu(
    shared_lenet5: Artifact, engine: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def candidates(*backends: str) -> list[tuple[str, str]]:
        plan = make_plan([shared_lenet5, engine], BenchOptions(backends=backends), named=True)
        return [(each.artifact.path.name, each.backend) for each in plan.candidates]

    monkeypatch.setattr("deploy.bench.plan.has_gpu", lambda: True)
    assert candidates("tensorrt-rtx") == [("lenet5-engine", "tensorrt-rtx")]
    assert candidates("tensorrt-rtx:cuda_graph", "null") == [("lenet5", "null"), ("lenet5-engine", "tensorrt-rtx:cuda_graph")]
    assert candidates()[-1] == ("lenet5-engine", "tensorrt-rtx")
    with pytest.raises(BackendError, match=r"lenet5-engine is a tensorrt-rtx engine"):
        candidates("onnxruntime")
    with pytest.raises(BackendError, match=r"tensorrt runs engines, and no artifact here is one of its"):
        candidates("tensorrt")

    def missing(backend: Backend) -> None:
        raise BackendError(f"{backend.name} is not installed")

    monkeypatch.setattr("deploy.bench.plan.import_backend", missing)
    plan = make_plan([shared_lenet5, engine], BenchOptions(), named=False)
    assert [(entry.backend, entry.reason) for entry in plan.skipped] == [("tensorrt-rtx", "tensorrt-rtx is not installed")]


def test_a_fixed_batch_is_the_default_and_another_is_an_error(fixed: Artifact) -> None:
    assert make_plan([fixed], BenchOptions(), named=True).batches == (1,)
    with pytest.raises(UsageError, match=r"lenet5-fixed takes batches of 1 only; `batches` asks for 1, 4"):
        make_plan([fixed], BenchOptions(batches=(1, 4)), named=True)


def test_a_fixed_batch_beside_a_dynamic_one_is_measured_where_it_fits(shared_lenet5: Artifact, fixed: Artifact) -> None:
    assert fixed.manifest.source.state_dict == shared_lenet5.manifest.source.state_dict
    plan = make_plan([fixed, shared_lenet5], BenchOptions(backends=("null",)), named=True)
    assert {each.artifact.path.name: each.batches for each in plan.candidates} == {"lenet5-fixed": (1,), "lenet5": BATCHES}
    assert plan.baseline.artifact.path == shared_lenet5.path  # which can run at all of them


def test_artifacts_of_other_weights_are_not_compared(shared_lenet5: Artifact, tmp_path: Path) -> None:
    source = msgspec.structs.replace(shared_lenet5.manifest.source, state_dict="0" * 64)
    other = remake(shared_lenet5, tmp_path / "other", source=source)
    with pytest.raises(UsageError, match=r"other and .*lenet5 do not descend from the same state_dict"):
        make_plan([shared_lenet5, other], BenchOptions(), named=True)


def test_artifacts_of_other_shapes_are_not_compared(shared_lenet5: Artifact, tmp_path: Path) -> None:
    (spec,) = shared_lenet5.manifest.inputs
    wider = msgspec.convert({"name": spec.name, "dtype": spec.dtype, "shape": ["batch", 1, 32, 32]}, type(spec))
    other = remake(shared_lenet5, tmp_path / "wider", inputs=[wider])
    with pytest.raises(
        UsageError, match=r"wider has input: float32 batchx1x32x32 where .*lenet5 has input: float32 batchx1x28x28"
    ):
        make_plan([shared_lenet5, other], BenchOptions(), named=True)


def test_a_bare_onnx_file_has_no_baseline(tiny_onnx: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"tiny.onnx does not name the model that it was made from, so there is no eager baseline"
    ):
        make_plan([open_onnx(tiny_onnx)], BenchOptions(), named=True)


def test_a_baseline_that_is_gone_is_named(half: Artifact, tmp_path: Path) -> None:
    shutil.copytree(half.path, tmp_path / "alone")
    with pytest.raises(ArtifactError, match=rf"the parent of .*alone cannot be used: no artifact at {tmp_path / 'lenet5'}"):
        make_plan([Artifact.open(tmp_path / "alone")], BenchOptions(), named=True)


def test_an_orphan_that_was_found_is_listed_beside_what_can_be_measured(
    shared_lenet5: Artifact, half: Artifact, tmp_path: Path
) -> None:
    shutil.copytree(half.path, tmp_path / "alone")
    orphan = Artifact.open(tmp_path / "alone")
    plan = make_plan([orphan, shared_lenet5], BenchOptions(backends=("null",)), named=False)
    assert [entry.artifact for entry in plan.skipped] == [orphan.shown]
    assert [each.artifact.path for each in plan.candidates] == [shared_lenet5.path]
    with pytest.raises(ArtifactError, match=r"nothing to benchmark: the parent of .*alone cannot be used"):
        make_plan([orphan], BenchOptions(), named=False)


def test_no_artifacts_are_an_error() -> None:
    with pytest.raises(UsageError, match="nothing to benchmark"):
        make_plan([], BenchOptions(), named=True)


def test_found_are_all_that_share_the_weights_of_the_newest(
    shared_lenet5: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build = tmp_path / "build"
    other = msgspec.structs.replace(shared_lenet5.manifest.source, state_dict="0" * 64)
    remake(shared_lenet5, build / "old", source=other)
    remake(shared_lenet5, build / "first")
    remake(shared_lenet5, build / "deeper" / "second")
    remake(shared_lenet5, build / ".third.0.partial")
    (build / "broken").mkdir()
    (build / "broken" / "manifest.json").write_text("{", encoding="utf-8")
    (build / "notes.txt").write_text("mine", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        found = find_artifacts(build)
    assert [artifact.path for artifact in found] == [build / "first", build / "deeper" / "second"]
    assert "left out" in caplog.text
    assert "broken" in caplog.text


def test_nothing_to_find_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no artifacts under .*build: name one, or make one with `deploy export`"):
        find_artifacts(tmp_path / "build")


def test_a_package_runs_on_aoti_alone_and_on_the_device_that_it_was_built_for(
    shared_lenet5: Artifact, package: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def candidates(artifact: Artifact, *backends: str) -> list[tuple[str, str, str]]:
        plan = make_plan([artifact], BenchOptions(backends=backends), named=True)
        assert plan.baseline.artifact.path == package.root().path
        return [(each.artifact.path.name, each.backend, each.device) for each in plan.candidates]

    assert candidates(package) == [("lenet5", "aoti", "cpu")]
    assert candidates(package, "aoti", "compile") == [("lenet5", "aoti", "cpu"), ("lenet5", "compile", "cpu")]
    assert package.manifest.package is not None
    target = msgspec.structs.replace(package.manifest.package, device="cuda", gpu="a GPU", compute_capability="9.0")
    on_gpu = Artifact(package.path, msgspec.structs.replace(package.manifest, package=target))
    monkeypatch.setattr("deploy.bench.plan.has_gpu", lambda: True)
    assert candidates(on_gpu, "aoti:cuda_graph", "eager:fp16") == [
        ("lenet5", "aoti:cuda_graph", "cuda"),
        ("lenet5", "eager:fp16", "cuda"),
    ]
    with pytest.raises(BackendError, match="is an AOTInductor package: it runs with the backend aoti"):
        candidates(package, "onnxruntime")
    with pytest.raises(BackendError, match=r"aoti runs AOTInductor packages, and no artifact here is one .*`deploy build-aoti`"):
        make_plan([shared_lenet5], BenchOptions(backends=("aoti",)), named=True)
