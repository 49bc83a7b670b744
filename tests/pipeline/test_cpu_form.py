"""The CPU form in an INT8 artifact: what is written, what runs it, and what is said of it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes import PassResult
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import CPU_ONNX, ONNX
from deploy.artifact.onnxfile import load_model, save_model
from deploy.artifact.summary import evidence, summary
from deploy.errors import ArtifactError, UsageError
from deploy.host.cpu import QUANTIZES_WEIGHTS, has_vnni
from deploy.precision.int8 import quantize as int8
from deploy.precision.int8.cache import Calibrated
from deploy.precision.int8.cpu_form import CpuForm
from deploy.precision.int8.placement import Placement
from deploy.precision.int8.unsigned import ToUnsigned

FEED = {"input": np.random.default_rng(0).normal(size=(1, 1, 28, 28)).astype(np.float32)}
vnni = pytest.mark.skipif(not has_vnni(), reason="the processor has no VNNI: ONNX Runtime runs the signed file here")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of two pictures of noise, 28 x 28."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("noise")
    for label in range(10):
        (folder / str(label)).mkdir()
        for index in range(2):
            Image.fromarray(rng.integers(0, 256, (28, 28)).astype(np.uint8)).save(folder / str(label) / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return deploy.export(tmp_path_factory.mktemp("net") / "convnet", arch="convnet", preprocess="mnist")


@pytest.fixture(scope="module")
def made(convnet: Artifact, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return deploy.quantize(convnet, tmp_path_factory.mktemp("int8") / "int8", calib=images, eval_folder=images, max_drop=100)


@pytest.fixture(scope="module")
def unjudged(convnet: Artifact, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Without an accuracy, which a processor without VNNI cannot measure of the CPU form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return deploy.quantize(convnet, tmp_path_factory.mktemp("int8") / "int8", calib=images)


@pytest.fixture(scope="module")
def favourite(convnet: Artifact, images: Path) -> int:
    """The class that the net finds in noise."""
    with deploy.load(convnet, "onnxruntime") as session:
        return int(session.run({"input": convnet.preprocess.open(images / "0" / "0.png")[None]})["logits"].argmax())


@pytest.fixture
def biased(monkeypatch: pytest.MonkeyPatch, favourite: int) -> None:
    """The correction of the last bias, in the CPU form alone, keeps the net from its favourite class."""
    made = int8.cpu_form

    def form(model: ir.Model, placement: Placement, known: Calibrated, **options: bool) -> CpuForm:
        away = -100 * np.eye(10, dtype=np.float32)[favourite]
        bias = {name: value + away if len(value) == 10 else value for name, value in known.bias.items()}
        return made(model, placement, replace(known, bias=bias), **options)

    monkeypatch.setattr(int8, "cpu_form", form)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], None]:
    """`broken("int32", -1)`: what the CPU form stores under names with this ending is multiplied, in it alone."""

    def multiply(ending: str, factor: float) -> None:
        class Wrong(ToUnsigned):
            def call(self, model: ir.Model) -> PassResult:
                result = super().call(model)
                found = [value for name, value in model.graph.initializers.items() if name.endswith(ending)]
                for value in found:
                    array = value.const_value.numpy()
                    value.const_value = ir.tensor((array * factor).astype(array.dtype), name=value.name)
                assert found
                return result

        monkeypatch.setattr("deploy.precision.int8.cpu_form.ToUnsigned", Wrong)

    return multiply


def test_both_files_are_listed_with_their_hashes_and_evidence(unjudged):
    manifest = unjudged.manifest
    assert {ONNX, CPU_ONNX} <= set(manifest.files)
    assert unjudged.size == manifest.files[ONNX].bytes
    assert manifest.cpu_form.left_out is None
    assert manifest.cpu_form.parity.against == manifest.parity.against
    assert manifest.cpu_form.parity.worst != manifest.parity.worst  # of another file
    assert [text for text in evidence(manifest) if text.startswith("CPU form: model.cpu.onnx: max abs")]
    assert "CPU form   model.cpu.onnx: max abs" in summary(unjudged)
    assert json.loads(manifest.to_json())["cpu_form"]["parity"]["cases"]


@vnni
def test_onnxruntime_runs_it_and_others_the_signed_file(made):
    for backend, name in (("onnxruntime", CPU_ONNX), ("auto", CPU_ONNX), ("openvino", ONNX)):
        with deploy.load(made, backend) as session:
            assert session.onnx_file == made.path / name
            operators = {layer.operator for layer in session.layer_times(FEED, runs=1)}
            assert ("QLinearConv" in operators) is (name == CPU_ONNX)


@vnni
@pytest.mark.parametrize(
    "left", [["classifier.4"], ["features.3"], ["features.3", "classifier.1", "classifier.4"], ["features.0", "classifier.4"]]
)
def test_no_weight_is_dequantized_at_every_run_beside_layers_in_floating_point(convnet, images, tmp_path, left):
    """A layer whose reader is in floating point has no kernel on codes behind Relu, and a convolution has none at all."""
    made = deploy.quantize(convnet, tmp_path / "int8", calib=images, exclude=[f"{name}/*" for name in left], min_share=0)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # that this file is for this processor
    onnxruntime.InferenceSession(made.cpu_path, options, ["CPUExecutionProvider"], disabled_optimizers=[QUANTIZES_WEIGHTS])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    constants = {each.name for each in graph.initializer}
    assert [node.name for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants] == []
    kernels = {"QLinearConv", "QGemm"}
    assert sum(node.op_type in kernels for node in graph.node) >= 1


@vnni
def test_the_evidence_is_what_the_session_computes(made, convnet, images):
    """The parity is of some of the images, so that the largest error on all of them is that or a little more."""
    with deploy.load(made, "onnxruntime") as session, deploy.load(convnet, "onnxruntime") as reference:
        feeds = [{"input": convnet.preprocess.open(path)[None]} for path in images.rglob("*.png")]
        off = max(np.abs(session.run(feed)["logits"] - reference.run(feed)["logits"]).max() for feed in feeds)
    assert 0.999 < off / made.manifest.cpu_form.parity.worst.max_abs < 3


def test_accuracy_is_that_of_every_backend_and_file_and_the_worst_counts(made):
    found = made.manifest.accuracies
    ran = {(each.backend, each.file) for each in found}
    assert {("onnxruntime", None), ("openvino", None)} <= ran
    assert (("onnxruntime", CPU_ONNX) in ran) is has_vnni()
    assert made.manifest.accuracy == found[0]
    assert found[0].top1_drop == max(each.top1_drop for each in found)
    assert summary(made).count("top-1 ") == len(found)


def test_without_vnni_the_signed_file_runs(made, monkeypatch):
    monkeypatch.setattr("deploy.runtime.catalog.has_vnni", lambda: False)
    for backend, name in (("onnxruntime", "onnxruntime"), ("auto", "openvino")):
        with deploy.load(made, backend) as session:
            assert (session.backend, session.onnx_file) == (name, made.onnx_path)


def test_without_vnni_the_parity_is_that_of_sums_in_32_bits(convnet, images, tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.runtime.catalog.has_vnni", lambda: False)
    found = deploy.quantize(convnet, tmp_path / "int8", calib=images, eval_folder=images, max_drop=100)
    assert found.manifest.cpu_form.parity is None
    assert "cannot be judged here: this processor has no VNNI" in found.manifest.cpu_form.left_out
    found = deploy.quantize(convnet, tmp_path / "int8", calib=images)
    assert found.manifest.cpu_form.parity.by.endswith("without VNNI, in 32 bits")


def test_a_damaged_form_is_named(unjudged, tmp_path):
    shutil.copytree(unjudged.path, tmp_path / "copy")
    (tmp_path / "copy" / CPU_ONNX).write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=CPU_ONNX):
        deploy.load(tmp_path / "copy", "openvino")


def test_it_can_be_left_out(convnet, images, tmp_path):
    found = deploy.quantize(convnet, tmp_path / "int8", calib=images, cpu_form=False)
    assert (found.cpu_path, found.manifest.cpu_form) == (None, None)
    assert "CPU form" not in summary(found)
    with deploy.load(found, "onnxruntime") as session:
        assert session.onnx_file == found.onnx_path
    with deploy.load(found) as session:
        assert session.backend == "openvino"


def test_one_that_is_too_far_off_is_not_written_and_the_summary_says_why(convnet, images, tmp_path, biased, caplog):
    found = deploy.quantize(convnet, tmp_path / "int8", calib=images)
    assert not (found.path / CPU_ONNX).exists()
    assert "CPU form   model.cpu.onnx left out: on onnxruntime" in summary(found)
    assert "model.cpu.onnx is left out" in caplog.text
    assert found.manifest.parity is not None


@pytest.mark.parametrize(
    ("ending", "factor", "message"),
    [
        ("_int32", -1, "it computes something else than its source, INT8 aside"),
        ("_quantized_scale", 1.1, "scale and zero point of 'input' in the written file, where 'features.0/Conv' reads it, are"),
        ("weight_int8", 0.9, "the INT8 weight of 'features.0/Conv' in the written file is not its FP32 weight"),
    ],
)
def test_a_fault_in_the_written_file_is_found_by_what_it_must_hold(convnet, images, tmp_path, broken, ending, factor, message):
    broken(ending, factor)
    found = deploy.quantize(convnet, tmp_path / "int8", calib=images)
    assert found.cpu_path is None
    assert message in found.manifest.cpu_form.left_out


@vnni
def test_one_that_loses_too_much_accuracy_is_not_written(convnet, images, tmp_path, biased, favourite):
    shutil.copytree(images, tmp_path / "eval")
    for index in range(30):
        shutil.copyfile(images / "0" / "0.png", tmp_path / "eval" / str(favourite) / f"more{index}.png")
    bounds = {"rtol": 1e4, "min_cosine": -1, "min_sqnr": -1e4}
    found = deploy.quantize(convnet, tmp_path / "int8", calib=images, eval_folder=tmp_path / "eval", max_drop=20, **bounds)
    assert "it loses" in found.manifest.cpu_form.left_out
    assert "points of top-1 accuracy" in found.manifest.cpu_form.left_out
    assert all(each.file is None for each in found.manifest.accuracies)


def test_the_copy_from_the_cache_has_it(convnet, images, tmp_path, monkeypatch):
    first = deploy.quantize(convnet, tmp_path / "first", calib=images)
    monkeypatch.setattr(int8, "cpu_form", lambda *_, **__: pytest.fail("made again"))
    second = deploy.quantize(convnet, tmp_path / "second", calib=images)
    assert second.manifest.files == first.manifest.files
    assert second.manifest.cpu_form == first.manifest.cpu_form
    second.verify()


def test_large_weights_lie_beside_it(convnet, images, tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.precision.int8.cpu_form.save_model", lambda model, path: save_model(model, path, external_over=0))
    found = deploy.quantize(convnet, tmp_path / "int8", calib=images)
    assert f"{CPU_ONNX}.data" in found.manifest.files
    assert found.size == found.manifest.files[ONNX].bytes
    with deploy.load(found, "onnxruntime") as session:
        session.warmup()


def test_an_engine_or_another_descendant_says_nothing_of_it(made, tmp_path):
    found = deploy.build_trt(made, tmp_path / "engine", flavour="tensorrt-rtx")
    assert (found.manifest.cpu_form, found.cpu_path) == (None, None)
    assert {each.file for each in found.manifest.accuracies} == {None}
    assert found.manifest.accuracy == found.manifest.accuracies[0]
    assert {node.op_type for node in load_model(found.onnx_path).graph} & {"QuantizeLinear"}


def test_a_backend_alone_may_judge_the_accuracy(convnet, images, tmp_path):
    found = deploy.quantize(
        convnet, tmp_path / "int8", calib=images, eval_folder=images, max_drop=100, backend="openvino", cpu_form=False
    )
    assert [each.backend for each in found.manifest.accuracies] == ["openvino"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "openvino"}, "`backend` needs `eval_folder`"),
        ({"backend": "null", "eval_folder": "x"}, "cannot be judged on null"),
        ({"backend": "eager", "eval_folder": "x"}, "cannot be judged on eager"),
        ({"backend": "tvm", "eval_folder": "x"}, "unknown backend 'tvm'"),
    ],
)
def test_a_backend_that_cannot_judge_is_refused_before_any_work(convnet, images, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        deploy.quantize(convnet, tmp_path / "int8", calib=images, **options)


@vnni
def test_an_excluded_layer_between_others_stays_in_floating_point(tmp_path):
    """It reads what it reads in the signed graph, numbers that nothing rounded; so the layer before it is computed on floats too."""
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) {'
        " [first] a = Conv(x, w1) [r1] b = Relu(a) [middle] c = Conv(b, w2) [r2] d = Relu(c) [last] e = Conv(d, w3) [t] y = Tanh(e) }"
    )
    for name in ("w1", "w2", "w3"):
        graph.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=(4, 4, 1, 1)).astype(np.float32), name))
    onnx.save(graph, tmp_path / "net.onnx")
    feed = {"x": rng.normal(size=(2, 4, 8, 8)).astype(np.float32)}
    made = deploy.quantize(tmp_path / "net.onnx", tmp_path / "int8", calib=[feed], exclude=["middle"])
    with deploy.load(made, "onnxruntime") as session:
        operators = [layer.operator for layer in session.layer_times(feed, runs=1)]
    assert operators.count("QLinearConv") == 1
    assert sum(name in ("Conv", "FusedConv") for name in operators) == 2
    nodes = {node.name: node for node in onnx.load(made.path / CPU_ONNX).graph.node}
    assert (nodes["middle"].input[0], nodes["r1"].output[0]) == ("b", "b")
