"""The stage `build-trt`: the engine artifact, its evidence and its profiles."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX
from deploy.artifact.tensors import random_feed
from deploy.errors import ArtifactError, BackendError, DataError, EngineError, UsageError
from deploy.evaluation import gate
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
def test_reference_architectures_build(
    name: str, precision: str | None, reference: Callable[[str], Artifact], tmp_path: Path
) -> None:
    """The four that are not in the tests of single stages; the large ones are built by `benchmarks/engines.py`."""
    engine = deploy.build_trt(reference(name), tmp_path / "engine", precision=precision)  # type: ignore[arg-type]
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


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Ten classes of one picture of noise."""
    rng = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / "digits" / str(label)).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(tmp_path / "digits" / str(label) / "0.png")
    return tmp_path / "digits"


@pytest.fixture
def classifier(tmp_path: Path) -> Artifact:
    return deploy.export(tmp_path / "classifier", arch="lenet5", preprocess="mnist")


@pytest.mark.parametrize("quantized_before", [True, False])
def test_the_accuracy_of_int8_is_compared_with_the_fp32_artifact(
    classifier: Artifact, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized_before: bool
) -> None:
    source = deploy.quantize(classifier, tmp_path / "int8", calib=digits) if quantized_before else classifier
    evaluated: list[str] = []
    real = gate.measure

    def spy(artifact: Artifact, *args: Any, **options: Any) -> Any:
        evaluated.append(artifact.manifest.precision)
        return real(artifact, *args, **options)

    monkeypatch.setattr(gate, "measure", spy)
    calib = None if quantized_before else digits
    engine = deploy.build_trt(source, tmp_path / "engine", int8=True, calib=calib, eval_folder=digits, max_drop=100)
    assert evaluated == ["fp32", "int8", "int8"]  # on both backends of the CPU
    assert engine.manifest.accuracy is not None
    assert engine.manifest.accuracy.parent_top1 == deploy.evaluate(classifier, digits).top1


def test_an_int8_artifact_whose_fp32_parent_is_gone_cannot_be_judged_and_says_so(
    classifier: Artifact, digits: Path, tmp_path: Path
) -> None:
    int8 = deploy.quantize(classifier, tmp_path / "int8", calib=digits)
    bare = tmp_path / "alone.onnx"
    bare.write_bytes(int8.onnx_path.read_bytes())
    shutil.rmtree(classifier.path)
    never = "has no FP32 artifact that it was made from, and the accuracy of INT8 is compared with it"
    for source, message in ((int8, "no artifact at .*classifier"), (deploy.open_artifact(bare), never)):
        with pytest.raises(ArtifactError, match=message):
            deploy.build_trt(source, tmp_path / "engine", int8=True, eval_folder=digits)
        assert not (tmp_path / "engine").exists()
    deploy.build_trt(deploy.open_artifact(bare), tmp_path / "engine", int8=True)  # without accuracy it can be built


def segmenter(folder: Path) -> Artifact:
    """A net whose output is a map of classes."""
    (folder / "maps_net.py").write_text(
        "import torch\nclass Maps(torch.nn.Conv2d):\n    def __init__(self):\n        super().__init__(1, 3, 3)\n"
    )
    inputs = ["image=1x1x28x28"]
    return deploy.export(folder / "maps", model=f"{folder / 'maps_net.py'}:Maps", inputs=inputs, preprocess="mnist")


def wrong_classes(folder: Path) -> Artifact:
    (folder / "classes.txt").write_text("".join(f"class {index}\n" for index in range(10)))
    return deploy.export(folder / "other", arch="lenet5", preprocess="mnist", classes=folder / "classes.txt")


def no_images(folder: Path) -> Artifact:
    return deploy.export(folder / "mlp", arch="mlp")


@pytest.mark.parametrize("build", [True, False])
@pytest.mark.parametrize("make", [segmenter, wrong_classes, no_images])
def test_a_model_that_cannot_be_judged_by_top1_is_refused_before_it_is_calibrated(
    make: Callable[[Path], Artifact], build: bool, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path)
    monkeypatch.setattr("deploy.precision.int8.quantize.quantize_onnx", lambda *_: pytest.fail("the calibration began"))
    monkeypatch.setattr("deploy.pipeline.typed.quantize_onnx", lambda *_: pytest.fail("the calibration began"))
    calib = [random_feed(source.manifest.inputs, {"batch": 1})]
    with pytest.raises((UsageError, DataError)):
        if build:
            deploy.build_trt(source, tmp_path / "out", int8=True, calib=calib, eval_folder=digits)
        else:
            deploy.quantize(source, tmp_path / "out", calib=calib, eval_folder=digits)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            "g (double[N, 2] x) => (double[N, 2] y) <double[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }",
            r"computes in double precision, and TensorRT does not: export the model in FP32",
        ),
        (
            "g (float[N, 2] x) => (float[N, 2] y, float[N, 2] x) { y = Relu(x) }",
            r"'x' is an input and an output of .*, and an engine needs two names",
        ),
    ],
)
def test_a_graph_that_no_engine_can_be_is_refused_at_once(graph: str, message: str, tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {graph}'), tmp_path / "net.onnx")
    with pytest.raises(UsageError, match=message):
        deploy.build_trt(tmp_path / "net.onnx", tmp_path / "out", flavour="tensorrt-rtx")
    with pytest.raises(UsageError, match=message):
        deploy.preflight(tmp_path / "net.onnx", flavour="tensorrt-rtx")


@pytest.mark.parametrize("wanted", ["int8", "fp8"])
def test_what_is_in_half_precision_is_not_quantized(wanted: str, lenet5: Artifact, tmp_path: Path) -> None:
    half = deploy.convert(lenet5, tmp_path / "half", precision="fp16")
    feed = {"input": np.zeros((1, 1, 28, 28), np.float32)}
    with pytest.raises(UsageError, match=f"half is fp16 already, and `{wanted}` takes an FP32 artifact"):
        deploy.build_trt(half, tmp_path / "engine", calib=[feed], **{wanted: True})
