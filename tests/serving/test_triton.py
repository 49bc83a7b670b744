"""Triton's model repositories, read with the protocol buffers of Triton's own client."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX, Parent, Target
from deploy.artifact.tensors import ShapeRange
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import BackendError, OutputError, UsageError
from deploy.serving.source import ModelSource
from deploy.serving.triton import KSERVE, TritonOptions, export_triton


def source(artifact: Artifact, name: str = "digits", version: str = "1") -> ModelSource:
    return ModelSource(name=name, path=artifact.path, version=version)


def config(repository: Path, name: str = "digits") -> Any:
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def engine(parent: Artifact, folder: Path, flavour: str, *, stripped: bool = False) -> Artifact:
    """An artifact that says it is an engine, of two profiles; its plan is no real one."""
    manifest = parent.manifest
    with ArtifactWriter(folder) as writer:
        (writer.path / ENGINE).write_bytes(b"plan")
        (writer.path / ONNX).write_bytes(parent.onnx_path.read_bytes())
        sides = [
            ShapeRange(min=(low, 1, 28, 28), opt=(high, 1, 28, 28), max=(high, 1, 28, 28)) for low, high in ((1, 4), (5, 16))
        ]
        return writer.commit(
            msgspec.structs.replace(
                manifest, kind="engine", name=folder.name, files={}, parent=Parent(path=str(parent.path), digest=manifest.digest),
                profiles=[{"input": side} for side in sides],
                target=Target(flavour=flavour, version="10.13", gpu="H100", compute_capability="9.0", targets=[], stripped=stripped),
            )
        )  # fmt: skip


def test_an_onnx_artifact_becomes_a_model_that_onnx_runtime_runs(shared_lenet5: Artifact, tmp_path: Path) -> None:
    options = TritonOptions(instances=2, max_batch=16, delay_us=500, keep_versions=3, cpu=True)
    (folder,) = export_triton([source(shared_lenet5)], tmp_path / "repo", options)
    assert folder == tmp_path / "repo" / "digits" / "1"
    assert [file.name for file in folder.iterdir()] == ["model.onnx"]  # and not the weights for eager
    model = config(tmp_path / "repo")
    assert (model.name, model.platform, model.max_batch_size) == ("digits", "onnxruntime_onnx", 16)
    assert [(spec.name, spec.data_type, list(spec.dims)) for spec in model.input] == [
        ("input", model_config_pb2.TYPE_FP32, [1, 28, 28])
    ]
    assert [(spec.name, list(spec.dims)) for spec in model.output] == [("logits", [10])]
    (group,) = model.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 2)
    assert model.dynamic_batching.max_queue_delay_microseconds == 500
    assert list(model.dynamic_batching.preferred_batch_size) == [8]
    assert model.version_policy.latest.num_versions == 3
    assert [warmup.batch_size for warmup in model.model_warmup] == [1, 8, 16]
    assert list(model.model_warmup[0].inputs["input"].dims) == [1, 28, 28]
    x = np.random.default_rng(0).standard_normal((3, 1, 28, 28), dtype=np.float32)
    with deploy.load(shared_lenet5) as session:
        (result,) = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"input": x})
        np.testing.assert_allclose(result, session(x), rtol=1e-5, atol=1e-6)


def test_class_names_become_labels(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("".join(f"digit {index}\n" for index in range(10)))
    made = deploy.export(tmp_path / "net", arch="lenet5", classes=tmp_path / "classes.txt")
    export_triton([source(made)], tmp_path / "repo")
    assert config(tmp_path / "repo").output[0].label_filename == "labels.txt"
    assert (tmp_path / "repo/digits/labels.txt").read_text().splitlines()[3] == "digit 3"


def test_inputs_of_several_dtypes_and_a_model_with_a_fixed_batch(pair: Artifact, fixed: Artifact, tmp_path: Path) -> None:
    export_triton([source(pair, "pair"), source(fixed, "fixed")], tmp_path / "repo")
    both = config(tmp_path / "repo", "pair")
    assert [spec.data_type for spec in both.input] == [model_config_pb2.TYPE_FP32, model_config_pb2.TYPE_INT64]
    assert both.max_batch_size == 32
    alone = config(tmp_path / "repo", "fixed")
    assert (alone.max_batch_size, list(alone.input[0].dims), alone.HasField("dynamic_batching")) == (0, [1, 1, 28, 28], False)
    assert [list(warmup.inputs["input"].dims) for warmup in alone.model_warmup] == [[1, 1, 28, 28]]


def test_an_engine_becomes_a_plan_and_one_of_tensorrt_rtx_is_refused_with_the_reason(
    shared_lenet5: Artifact, tmp_path: Path
) -> None:
    plan = engine(shared_lenet5, tmp_path / "engine", "tensorrt")
    (folder,) = export_triton([source(plan)], tmp_path / "repo")
    assert [file.name for file in folder.iterdir()] == ["model.plan"]
    model = config(tmp_path / "repo")
    assert (model.platform, model.max_batch_size) == ("tensorrt_plan", 16)
    assert model.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(model.instance_group[0].profile) == ["0", "1"]
    rtx = engine(shared_lenet5, tmp_path / "rtx", "tensorrt-rtx")
    with pytest.raises(BackendError, match="is a tensorrt-rtx engine, which Triton cannot run"):
        export_triton([source(shared_lenet5, "other"), source(rtx)], tmp_path / "repo")
    stripped = engine(shared_lenet5, tmp_path / "stripped", "tensorrt", stripped=True)
    with pytest.raises(BackendError, match="has no weights in its engine file, and Triton puts none in"):
        export_triton([source(stripped)], tmp_path / "repo")
    assert not (tmp_path / "repo/other").exists()  # nothing of the rest either
    with pytest.raises(UsageError, match="leave out `cpu`"):
        export_triton([source(plan, "third")], tmp_path / "repo", TritonOptions(cpu=True))


def test_versions_stand_beside_one_another_and_none_is_written_over(shared_lenet5: Artifact, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    export_triton([source(shared_lenet5), source(shared_lenet5, version="2")], repository)
    with pytest.raises(OutputError, match="digits/2 exists already"):
        export_triton([source(shared_lenet5, version="2")], repository)
    export_triton([source(shared_lenet5, version="10")], repository)
    assert sorted(path.name for path in (repository / "digits").iterdir()) == ["1", "10", "2", "config.pbtxt"]


def test_the_manifest_of_kserve(shared_lenet5: Artifact, tmp_path: Path) -> None:
    repository = tmp_path / "My Models"
    export_triton([source(shared_lenet5)], repository, TritonOptions(storage_uri="s3://bucket/a: b"))
    manifest = yaml.safe_load((repository / KSERVE).read_text())
    assert (manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
        "my-models",
    )
    model = manifest["spec"]["predictor"]["model"]
    assert (model["modelFormat"]["name"], model["protocolVersion"], model["storageUri"]) == ("triton", "v2", "s3://bucket/a: b")
    assert model["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_a_package_is_refused_with_the_reason(package: Artifact, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"is an AOTInductor package, .* the very torch that compiled it, .* `deploy serve`"):
        export_triton([source(package)], tmp_path / "repo")
    assert not (tmp_path / "repo").exists()
