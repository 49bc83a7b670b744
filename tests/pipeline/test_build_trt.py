"""The stage `build-trt`: the engine artifact, its evidence and its profiles."""

from pathlib import Path

import onnx
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX
from deploy.errors import BackendError, EngineError, UsageError
from deploy.models.registry import ARCHITECTURES


def test_an_fp16_engine_carries_the_typed_graph_and_its_evidence(lenet5: Artifact, tmp_path: Path) -> None:
    engine = deploy.build_trt(lenet5, tmp_path / "engine", precision="fp16")
    engine.verify()
    manifest = engine.manifest
    assert (manifest.kind, manifest.precision) == ("engine", "fp16")
    assert set(manifest.files) == {ENGINE, ONNX}
    assert manifest.precision_share is not None
    assert manifest.precision_share.fp16 == 1
    assert manifest.precision_share.origin == "network"
    assert manifest.target is not None
    assert (manifest.target.flavour, manifest.target.gpu) == ("tensorrt-rtx", None)
    assert manifest.parity is not None
    assert manifest.parity.against == lenet5.manifest.digest
    assert engine.root() == lenet5
    types = {tensor.data_type for tensor in onnx.load(engine.onnx_path).graph.initializer if len(tensor.dims) > 1}
    assert types == {onnx.TensorProto.FLOAT16}
    assert [str(spec) for spec in manifest.inputs] == ["input: float32 batchx1x28x28"]


def test_without_a_precision_the_file_is_built_as_it_is(lenet5: Artifact, tmp_path: Path) -> None:
    engine = deploy.build_trt(lenet5, tmp_path / "engine")
    assert engine.manifest.precision == "fp32"
    assert engine.manifest.precision_share is not None
    assert engine.manifest.precision_share.fp32 == 1
    half = deploy.convert(lenet5, tmp_path / "half", precision="fp16")
    again = deploy.build_trt(half, tmp_path / "again")
    assert again.manifest.precision == "fp16"
    assert again.manifest.precision_share is not None
    assert again.manifest.precision_share.fp16 == 1
    with pytest.raises(UsageError, match="fp16 already"):
        deploy.build_trt(half, tmp_path / "twice", precision="fp16")
    with pytest.raises(UsageError, match="an engine already"):
        deploy.build_trt(again, tmp_path / "thrice")


@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
@pytest.mark.parametrize("name", ["convnet", "mlp", "rangeseg", "mobilenet_v1_features"])
def test_reference_architectures_build(name: str, precision: str | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The four that are not in the tests of single stages; the large ones are built by `benchmarks/engines.py`."""
    root = tmp_path_factory.getbasetemp() / "architectures"
    small = ["input=1x3x64x64"] if name == "mobilenet_v1_features" else ()
    exported = deploy.export(root / name, arch=name, inputs=small)  # skipped where it stands
    engine = deploy.build_trt(exported, root / f"{name}-{precision}", precision=precision)  # type: ignore[arg-type]
    share = engine.manifest.precision_share
    assert share is not None
    left = {"ConvTranspose"} if precision == "bf16" else set()  # TensorRT-RTX has no such kernel
    assert {exclusion.node.rpartition("/")[2].partition("_")[0] for exclusion in engine.manifest.exclusions} <= left
    assert getattr(share, precision or "fp32") == (pytest.approx(0.956, abs=0.01) if engine.manifest.exclusions else 1)
    assert engine.size > 10_000
    assert len(engine.manifest.outputs) == len(ARCHITECTURES[name].outputs)


def test_a_bare_onnx_file_is_built(tiny_onnx: Path, tmp_path: Path) -> None:
    engine = deploy.build_trt(tiny_onnx, tmp_path / "engine", precision="fp16")
    assert engine.manifest.precision == "fp16"
    assert engine.manifest.parity is not None
    with pytest.raises(BackendError, match="engine"):
        deploy.load(engine)


def test_a_refused_graph_leaves_what_stood_there(lenet5: Artifact, tmp_path: Path) -> None:
    engine = deploy.build_trt(lenet5, tmp_path / "engine")
    folds = '<ir_version: 10, opset_import: ["" : 20]> g (float[n, 12, 16] x) => (float[n, 3, 5, 5] y) <int64[2] i = {5, 5}, int64[2] b = {2, 2}> { y = Col2Im(x, i, b) }'
    onnx.save(onnx.parser.parse_model(folds), tmp_path / "folds.onnx")
    with pytest.raises(EngineError, match="Col2Im") as caught:
        deploy.build_trt(tmp_path / "folds.onnx", tmp_path / "engine")
    assert "folds.onnx" in str(caught.value)
    assert ".partial" not in str(caught.value)
    assert Artifact.open(tmp_path / "engine") == engine


def test_the_same_request_is_skipped(lenet5: Artifact, tmp_path: Path) -> None:
    first = deploy.build_trt(lenet5, tmp_path / "engine", precision="fp16")
    inode = (tmp_path / "engine").stat().st_ino
    assert deploy.build_trt(lenet5, tmp_path / "engine", precision="fp16") == first
    assert (tmp_path / "engine").stat().st_ino == inode
    assert deploy.build_trt(lenet5, tmp_path / "engine", precision="fp16", tf32=True) != first
