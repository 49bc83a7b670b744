"""Faults in a written INT8 file that its outputs hardly show."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from deploy.artifact.onnxfile import load_model, save_model
from deploy.errors import ParityError
from deploy.precision.codes import FP8, INT8
from deploy.precision.cpu import CpuGraph
from deploy.precision.half.emulate import Emulate
from deploy.precision.half.rewrite import ToHalf
from deploy.precision.int8.placement import Selection, place
from deploy.precision.int8.rewrite import ToCodes
from deploy.precision.int8.smooth import Channels, Smooth
from deploy.precision.int8.stored import Stored

NET = """g (float[N, 8, 6, 6] x) => (float[] y) <float[8, 8, 3, 3] u, float[8] b, float[8, 8, 1, 1] v, float[16, 4] w, float[8, 4, 2, 2] t> {
    [first] a = Conv<pads = [1, 1, 1, 1]>(x, u, b)
    [second] c = Conv(a, v)
    d = Concat<axis = 1>(a, c)
    [up] e = ConvTranspose<strides = [2, 2]>(c, t)
    g = GlobalAveragePool(d)
    f = Flatten(g)
    [head] h = MatMul(f, w)
    k = ReduceMean(e)
    y = Add(h, k)
}"""
SCALES = {"x": 0.02, "a": 0.1, "c": 0.1, "d": 0.1, "f": 0.05, "g": 0.05}
Fault = Callable[[onnx.ModelProto], None]


@pytest.fixture(params=["fp32", "fp16"])
def written(request: pytest.FixtureRequest, build: Callable[[str], onnx.ModelProto], tmp_path: Path) -> tuple[Stored, Path]:
    model = ir.from_proto(build(NET))
    placement = place(model, Selection())
    scales = {tensor: SCALES[tensor] for tensor in placement.edges}
    bias = {"first": np.ones(8, np.float32), "second": np.ones(8, np.float32), "head": np.ones(4, np.float32)}
    stored = Stored.of(model, placement, scales, {}, bias, INT8)
    ToCodes(placement, scales, INT8, bias=bias)(model)
    if request.param == "fp16":
        ToHalf("fp16")(model)
    save_model(model, tmp_path / "net.onnx")
    return stored, tmp_path / "net.onnx"


def outputs(model: ir.Model) -> np.ndarray:
    return CpuGraph(model)({"x": np.random.default_rng(1).standard_normal((2, 8, 6, 6)).astype(np.float32)})["y"]


def unrounded(stored: Stored, path: Path) -> np.ndarray:
    model = load_model(path)
    stored.unround(model)
    if any(value.dtype == ir.DataType.FLOAT16 for value in model.graph.initializers.values()):
        Emulate()(model)
    return outputs(model)


def test_without_its_rounding_the_file_computes_what_its_source_does(
    written: tuple[Stored, Path], build: Callable[[str], onnx.ModelProto]
) -> None:
    exact = outputs(ir.from_proto(build(NET)))
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in onnx.load(written[1]).graph.initializer)
    np.testing.assert_allclose(unrounded(*written), exact, rtol=2e-2 if half else 1e-5, atol=2e-2 if half else 1e-5)


def test_what_is_not_rounded_still_counts(written: tuple[Stored, Path]) -> None:
    stored, path = written
    sound = unrounded(stored, path)
    for name in ("first/corrected_bias", "second/corrected_bias", "head/correction"):
        proto = onnx.load(path)
        change(name, lambda bias: bias + 1)(proto)
        onnx.save(proto, path.with_name("faulty.onnx"))
        assert np.abs(unrounded(stored, path.with_name("faulty.onnx")) - sound).max() > 0.5, name


def test_what_was_computed_is_in_the_file(written: tuple[Stored, Path]) -> None:
    stored, path = written
    assert set(stored.weights) == {"first", "second", "up", "head"}
    assert {"x", "a", "c"} <= set(stored.scales)
    stored.check(path)


def tensor_of(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def change(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def fault(proto: onnx.ModelProto) -> None:
        tensor = tensor_of(proto, name)
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(edit(array.copy())).astype(array.dtype), name))

    return fault


def one_channel(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda scale: np.concatenate([scale[:-1], scale[-1:] * factor])


def other_axis(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.name == "u/DequantizeLinear")
    next(attribute for attribute in node.attribute if attribute.name == "axis").i = 1


def float_again(proto: onnx.ModelProto) -> None:
    """A layer that reads an activation past its pair."""
    node = next(node for node in proto.graph.node if node.name == "second")
    dequantized = next(node for node in proto.graph.node if node.name == "v/DequantizeLinear")
    node.input[1] = dequantized.input[1]


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (change("u_scale", lambda scale: scale / 2), "weight of 'first'"),
        (change("v_scale", one_channel(2)), "weight of 'second'"),
        (change("t_scale", lambda scale: scale * 1.02), "weight of 'up'"),
        (change("w_int8", lambda codes: codes[::-1]), "weight of 'head'"),
        (change("w_int8", lambda codes: codes.T.reshape(codes.shape)), "weight of 'head'"),
        (change("x_scale", lambda scale: scale / 2), "scale of 'x' .* calibration gave 0.02"),
        (change("a_scale", lambda scale: scale * 1.01), "scale of 'a'"),
        (change("c_scale", lambda scale: scale * 4), "scale of 'c'"),
        (other_axis, "weight of 'first'"),
        (change("int8_zero_point", lambda zero: zero + 8), "the zero point of '.*' in the written file is not 0"),
        (float_again, "weight of 'second' .* it is not quantized"),
    ],
)
def test_a_fault_is_found_and_the_layer_named(written: tuple[Stored, Path], fault: Fault, names: str) -> None:
    stored, path = written
    proto = onnx.load(path)
    fault(proto)
    onnx.save(proto, path)
    with pytest.raises(ParityError, match=names):
        stored.check(path)


def test_the_correction_of_a_computed_bias_that_is_smoothed_too_is_taken_back(
    build: Callable[[str], onnx.ModelProto], tmp_path: Path
) -> None:
    net = "g (float[N, 8] x, float[4] b) => (float[] y) <float[8, 4] w> { c = Neg(b) [layer] y = Gemm(x, w, c) }"
    model = ir.from_proto(build(net))
    rng = np.random.default_rng(2)
    feed = {"x": rng.standard_normal((3, 8)).astype(np.float32), "b": np.ones(4, np.float32)}
    exact = CpuGraph(model)(feed)["y"]
    shift, scale = rng.standard_normal(8).astype(np.float32), np.full(8, 2, np.float32)
    Smooth(place(model, Selection()), {"x": Channels(shift=shift, scale=scale)})(model)
    placement = place(model, Selection())
    bias = {"layer": np.arange(4, dtype=np.float32)}
    scales = dict.fromkeys(placement.edges, 0.02)
    stored = Stored.of(model, placement, scales, {}, bias, INT8)
    ToCodes(placement, scales, INT8, bias=bias)(model)
    save_model(model, tmp_path / "net.onnx")
    read = load_model(tmp_path / "net.onnx")
    stored.unround(read)
    np.testing.assert_allclose(CpuGraph(read)(feed)["y"], exact, rtol=1e-5, atol=1e-5)


PRODUCTS = """g (float[N, 16] x) => (float[] y) <float[16, 32] u, float[32] b, float[8, 32] v> {
    [first] a = MatMul(x, u) c = Add(a, b) d = Relu(c) [second] y = Gemm<transB = 1>(d, v) }"""


def next_code(codes: np.ndarray) -> np.ndarray:
    """The next larger code of FP8 in the first place, away from zero."""
    changed = codes.copy().view(np.uint8)
    changed.flat[0] += -1 if changed.flat[0] & 0x7F == 0x7E else 1  # 0x7E is 448
    return changed.view(codes.dtype)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_a_file_in_fp8_is_checked_alike(half: bool, build: Callable[[str], onnx.ModelProto], tmp_path: Path) -> None:
    model = ir.from_proto(build(PRODUCTS))
    feed = {"x": np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)}
    exact = CpuGraph(model)(feed)["y"]
    placement = place(model, Selection(codes="fp8"))
    scales, bias = {"x": 0.01, "d": 0.05}, {"first": np.ones(32, np.float32)}
    stored = Stored.of(model, placement, scales, {}, bias, FP8)
    ToCodes(placement, scales, FP8, bias=bias)(model)
    if half:
        ToHalf("fp16")(model)
    path = tmp_path / "net.onnx"
    save_model(model, path)
    stored.check(path)
    read = load_model(path)
    stored.unround(read)
    Emulate()(read)
    np.testing.assert_allclose(CpuGraph(read)(feed)["y"], exact, rtol=2e-2 if half else 1e-5, atol=2e-2 if half else 1e-5)
    for name, edit, message in (
        ("u_fp8", next_code, "FP8 weight of 'first' .* is off by (0.[6-9]|1)"),
        ("v_scale", one_channel(1.1), "FP8 weight of 'second' .* is off by"),
        ("d_scale", lambda scale: scale * 1.01, "scale of 'd' .*'second'"),
    ):
        proto = onnx.load(path)
        change(name, edit)(proto)
        onnx.save(proto, tmp_path / "faulty.onnx")
        with pytest.raises(ParityError, match=message):
            stored.check(tmp_path / "faulty.onnx")
