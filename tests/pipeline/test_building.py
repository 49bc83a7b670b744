"""The stage `build-trt`: the engine artifact, its evidence and its profiles."""

from pathlib import Path

import onnx
import pytest

import deploy
from deploy.artifact import ENGINE, ONNX, Artifact
from deploy.errors import BackendError, EngineError, UsageError
from deploy.models.registry import ARCHITECTURES
from deploy.pipeline.building import parse_shapes
from deploy.tensors import ShapeRange


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


def test_shapes_make_the_profile_of_a_dynamic_input(tmp_path: Path) -> None:
    dynamic = deploy.export(tmp_path / "net", arch="mobilenet_v1", inputs=["input=1x3xHxW"])
    with pytest.raises(UsageError, match="dynamic in batch, H, W: say --shapes input=MIN:OPT:MAX"):
        deploy.build_trt(dynamic, tmp_path / "engine")
    shapes = "input=1x3x32x32:2x3x64x64:4x3x96x96"
    engine = deploy.build_trt(dynamic, tmp_path / "engine", precision="fp16", shapes=[shapes])
    assert str(engine.manifest.profiles[0]["input"]) == shapes.partition("=")[2]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("input=1x1x28x28:2x1x28x28", "expected NAME=MIN:OPT:MAX"),
        ("inptu=1x1x28x28", "unknown input 'inptu'"),
        ("input=4x1x28x28:2x1x28x28:8x1x28x28", "MIN <= OPT <= MAX"),
        ("input=1x3x28x28", "dimension 1 is fixed to 1"),
        ("input=nx1x28x28", "must be numbers"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(lenet5: Artifact, tmp_path: Path, shapes: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        deploy.build_trt(lenet5, tmp_path / "engine", shapes=[shapes])


@pytest.fixture(scope="module")
def rangeseg(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two inputs that share their batch."""
    return deploy.export(tmp_path_factory.mktemp("rangeseg") / "rangeseg", arch="rangeseg")


def test_shapes_of_one_input_give_the_batch_of_the_other(rangeseg: Artifact, tmp_path: Path) -> None:
    engine = deploy.build_trt(rangeseg, tmp_path / "engine", shapes=["intensity=1x1x64x256:2x1x64x256:4x1x64x256"])
    (profile,) = engine.manifest.profiles
    assert str(profile["distance"]) == str(profile["intensity"]) == "1x1x64x256:2x1x64x256:4x1x64x256"


def test_shapes_that_contradict_one_another_are_refused_by_the_names_of_both(rangeseg: Artifact, tmp_path: Path) -> None:
    shapes = ["distance=1x1x64x256", "intensity=1x1x64x256:2x1x64x256:4x1x64x256"]
    with pytest.raises(UsageError, match=r"'batch' as 1:1:1 in 'distance' and 1:2:4 in 'intensity'"):
        deploy.build_trt(rangeseg, tmp_path / "engine", shapes=shapes)
    with pytest.raises(UsageError, match="dimension 1 is fixed to 1"):
        deploy.build_trt(rangeseg, tmp_path / "engine", shapes=["distance=2x2x64x256"])
    assert not (tmp_path / "engine").exists()


def test_one_shape_stands_for_all_three() -> None:
    assert parse_shapes("x=2x3") == ("x", ShapeRange(min=(2, 3), opt=(2, 3), max=(2, 3)))


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
