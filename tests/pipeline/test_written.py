"""Faults that are planted between a source and its written file, and that the comparison must find."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.summary import summary
from deploy.errors import BackendError, ParityError, PrecisionError
from deploy.runtime.backends.openvino import OpenVinoSession

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
Plant = Callable[[onnx.ModelProto], None]


@contextlib.contextmanager
def planted(monkeypatch: pytest.MonkeyPatch, fault: Plant) -> Any:
    """Whatever a stage writes has the fault."""
    import onnx_ir as ir

    from deploy.artifact import onnxfile

    real = onnxfile.save_model

    def save(model: ir.Model, path: Path, **options: Any) -> None:
        real(model, path, **options)
        proto = onnx.load(path)
        fault(proto)
        onnx.save(proto, path)

    with monkeypatch.context() as patch:
        for module in (
            "deploy.pipeline.export",
            "deploy.pipeline.typed",
            "deploy.precision.converted",
            "deploy.precision.int8.quantize",
        ):
            patch.setattr(f"{module}.save_model", save)
        yield


def change(proto: onnx.ModelProto, wanted: Callable[[onnx.TensorProto], bool], factor: float) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if wanted(tensor))
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), tensor.name))


def scale_of_a_weight(proto: onnx.ModelProto) -> None:
    weights = {
        tensor.name for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    }
    node = next(node for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights)
    change(proto, lambda tensor: tensor.name == node.input[1], 0.5)


def a_weight(proto: onnx.ModelProto) -> None:
    change(proto, lambda tensor: tensor.data_type in FLOATS and len(tensor.dims) > 1, 1.5)


def the_mode_of_resize(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "Resize")
    attribute = next(attribute for attribute in node.attribute if attribute.name == "coordinate_transformation_mode")
    attribute.s = b"align_corners"


@pytest.fixture
def upsampling(tmp_path: Path) -> Path:
    text = """<ir_version: 10, opset_import: ["" : 20]>
        up (float[batch, 3, 8, 8] x) => (float[batch, 4, 12, 12] y) <float[4] s = {1, 1, 2, 2}, float[4, 3, 3, 3] w, float[4, 4, 3, 3] v> {
            a = Conv(x, w) u = Resize<mode = "linear", coordinate_transformation_mode = "half_pixel">(a, , s)
            p = Pad(u, pads) y = Conv(p, v) }"""
    model = onnx.parser.parse_model(text.replace("float[4] s", "int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}, float[4] s"))
    rng = np.random.default_rng(0)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in ("s", "pads")]
    del model.graph.initializer[:], model.graph.value_info[:]
    model.graph.initializer.extend(kept)
    for name, shape in (("w", (4, 3, 3, 3)), ("v", (4, 4, 3, 3))):
        model.graph.initializer.append(numpy_helper.from_array((rng.standard_normal(shape) / 5).astype(np.float32), name))
    onnx.save(model, tmp_path / "up.onnx")
    return tmp_path / "up.onnx"


def rows(shape: tuple[int, ...], name: str = "x") -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{name: rng.standard_normal(shape).astype(np.float32)} for _ in range(8)]


@pytest.mark.parametrize("fault", [a_weight, the_mode_of_resize])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_fault_in_a_converted_file_is_found(
    fault: Plant, precision: Any, upsampling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted(monkeypatch, fault), pytest.raises(ParityError, match=r"output 'y' is off by .*; nothing was written: .*limits"):
        deploy.convert(upsampling, tmp_path / "out", precision=precision)
    assert not (tmp_path / "out").exists()
    deploy.convert(upsampling, tmp_path / "out", precision=precision)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (scale_of_a_weight, "weight of 'Conv_0' in the written file is not its FP32 weight"),
        (the_mode_of_resize, "something else than its source, INT8 aside: output 'y'"),
    ],
)
@pytest.mark.parametrize("fp16", [False, True])
def test_a_fault_in_a_quantized_file_is_found(
    fault: Plant, says: str, fp16: bool, upsampling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # which would have the sound file of another fault
    with planted(monkeypatch, fault), pytest.raises(ParityError, match=says):
        deploy.quantize(upsampling, tmp_path / "out", calib=rows((2, 3, 8, 8)), fp16=fp16)
    assert not (tmp_path / "out").exists()
    deploy.quantize(upsampling, tmp_path / "out", calib=rows((2, 3, 8, 8)), fp16=fp16)


def test_a_fault_in_an_exported_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with planted(monkeypatch, a_weight), pytest.raises(ParityError, match="on onnxruntime"):
        deploy.export(tmp_path / "out", arch="lenet5")


@pytest.mark.parametrize(("fault", "precision"), [(a_weight, "fp16")])
def test_a_fault_in_the_typed_file_of_an_engine_is_found(
    fault: Plant, precision: Any, upsampling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted(monkeypatch, fault), pytest.raises(ParityError, match="is off by"):
        deploy.build_trt(upsampling, tmp_path / "out", precision=precision, flavour="tensorrt-rtx", cache=False)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_an_operator_that_a_newer_opset_defines_in_another_way_is_right(mode: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32), "s": np.float32([1, 1, 2, 2])}
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["a"]), onnx.helper.make_node("Upsample", ["a", "s"], ["y"], mode=mode)]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", 1, ["N", 3, 8, 8])],
        [info("y", 1, ["N", 4, 12, 12])],
        [numpy_helper.from_array(a, n) for n, a in tensors.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 9)])
    model.ir_version = 4
    onnx.save(model, tmp_path / "old.onnx")
    feeds = rows((2, 3, 8, 8))
    made = deploy.quantize(tmp_path / "old.onnx", tmp_path / "out", calib=feeds)
    with (
        deploy.load(tmp_path / "old.onnx", backend="onnxruntime") as source,
        deploy.load(made, backend="onnxruntime") as quantized,
    ):
        expected, found = source(feeds[0]["x"]), quantized(feeds[0]["x"])
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_a_file_that_is_wrong_on_another_backend_is_written_and_not_loaded_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OpenVinoSession._compute
    with monkeypatch.context() as patch:
        patch.setattr(OpenVinoSession, "_compute", lambda *args: [array + 1 for array in real(*args)])
        artifact = deploy.export(tmp_path / "out", arch="lenet5")
    parity = artifact.manifest.parity
    assert parity is not None
    assert parity.wrong_on("onnxruntime") is None
    figure = parity.wrong_on("openvino")
    assert figure is not None
    assert "off by 1" in figure
    assert "WRONG on openvino" in summary(artifact)
    with pytest.raises(
        BackendError, match="must not run on openvino: compared with what it was made from, output 'logits' is off by 1"
    ):
        deploy.load(artifact, backend="openvino")
    with deploy.load(artifact) as session:
        assert session.backend == "onnxruntime"


def test_where_memory_runs_out_the_file_is_not_called_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise BackendError("openvino failed to run 'out': std::bad_alloc")

    monkeypatch.setattr(OpenVinoSession, "_compute", full)
    with pytest.raises(BackendError, match="bad_alloc"):
        deploy.export(tmp_path / "out", arch="lenet5")
    assert not (tmp_path / "out").exists()


def test_every_backend_has_a_figure(reference: Callable[[str], Artifact]) -> None:
    parity = reference("lenet5").manifest.parity
    assert parity is not None
    assert [each.backend for each in parity.backends] == ["onnxruntime", "openvino"]
    for each in parity.backends:
        assert each.wrong is None
        assert [case.batch for case in each.cases] == [1, 2, 5]
        assert each.by.split()[0] == each.backend
    assert "on openvino" in summary(reference("lenet5"))


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_outputs_of_small_numbers_are_held_to_the_limits_too(
    size: float, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[N, 8] x) => (float[N, 6] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }'
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape, scale in (("w", (8, 8), 1.0), ("v", (8, 6), size)):
        model.graph.initializer.append(numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), name))
    onnx.save(model, tmp_path / "small.onnx")

    def wrong(proto: onnx.ModelProto) -> None:
        next(node for node in proto.graph.node if node.op_type == "Relu").op_type = "Neg"

    with planted(monkeypatch, wrong), pytest.raises(ParityError, match="is asked for"):
        deploy.convert(tmp_path / "small.onnx", tmp_path / "out", precision=precision)
    deploy.convert(tmp_path / "small.onnx", tmp_path / "out", precision=precision)


def test_rows_that_run_one_at_a_time_alone_are_compared_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[N, 4] x) => (float[a, b] y)
        <int64[2] s = {1, 4}, float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { r = Reshape(x, s) y = MatMul(r, w) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "one.onnx")
    (tmp_path / "feeds").mkdir()
    for index in range(3):
        np.savez(tmp_path / "feeds" / f"{index}.npz", x=np.random.default_rng(index).random((1, 4), dtype=np.float32))
    made = deploy.convert(tmp_path / "one.onnx", tmp_path / "out", precision="fp16", data=tmp_path / "feeds")
    assert "does not run with 2 rows" in caplog.text
    assert made.manifest.parity is not None
    assert [case.batch for case in made.manifest.parity.cases] == [1]


def test_a_backend_that_cannot_open_the_file_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[N, 2, 2] x) => (float[N] y)
        <float[2, 2] w = {1, 2, 3, 4}> { h = MatMul(x, w) y = Det(h) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "det.onnx")
    made = deploy.convert(tmp_path / "det.onnx", tmp_path / "out", precision="fp16")
    assert made.manifest.parity is not None
    assert [each.backend for each in made.manifest.parity.backends] == ["onnxruntime"]
    assert re.search(r"openvino \S+ cannot open the file, and is left out: .*Det", caplog.text)


def test_a_feed_that_was_given_and_does_not_run_is_an_error(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[1, 4] x, int64[1] i) => (float[1, 2] y)
        <float[3, 4] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}, float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
        { t = Gather(table, i) s = Add(x, t) y = MatMul(s, w) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "fixed.onnx")
    (tmp_path / "feeds").mkdir()
    for index in (0, 7):
        np.savez(tmp_path / "feeds" / f"{index}.npz", x=np.ones((1, 4), np.float32), i=np.array([index]))
    with pytest.raises(PrecisionError, match=r"fixed\.onnx cannot run input of the sizes x 1x4, i 1"):
        deploy.convert(tmp_path / "fixed.onnx", tmp_path / "out", precision="bf16", data=tmp_path / "feeds")


def test_where_a_bias_overflows_on_the_default_backend_nothing_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bias = (rng.standard_normal(8) * 0.5).astype(np.float32)
    bias[3] = 12
    weights = {
        "w": (rng.standard_normal((8, 8, 3, 3)) / 8).astype(np.float32),
        "b": bias,
        "v": (rng.standard_normal((4, 8, 3, 3)) / 8).astype(np.float32),
    }
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w", "b"], ["a"]),
        onnx.helper.make_node("Relu", ["a"], ["h"]),
        onnx.helper.make_node("Conv", ["h", "v"], ["y"]),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", 1, ["N", 8, 16, 16])],
        [info("y", 1, ["N", 4, 12, 12])],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(ParityError, match=r"on onnxruntime .*: output 'y' is off by"):
        deploy.quantize(tmp_path / "m.onnx", tmp_path / "out", calib=rows((2, 8, 16, 16)), fp16=True)
