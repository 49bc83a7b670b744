"""ONNX Runtime computes the CPU form on codes from the input to the last layer, and as exactly as the signed graph."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from deploy.artifact.find import open_artifact
from deploy.artifact.onnxfile import save_model
from deploy.data.calibration_set import calibration_set
from deploy.precision.cpu import CpuGraph
from deploy.precision.int8.options import QuantizeOptions
from deploy.precision.int8.quantize import Quantized, quantize_onnx

RESIDUAL = """g (float[N, 3, 16, 16] x) => (float[] y)
    <float[8, 3, 3, 3] w1, float[8] b1, float[8, 8, 1, 1] w2, float[8] b2, float[8, 8, 1, 1] w3, float[8] b3, float[8, 8, 1, 1] w4,
     float[5, 8] w5, float[5] b5> {
    [c1] a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) [r1] r = Relu(a) [pool] m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
    [c2] c = Conv(m, w2, b2) [s] s = Sigmoid(c) [silu] d = Mul(c, s)
    [mean] e = GlobalAveragePool(d) [fc1] f = Conv(e, w3, b3) [gate] h = Sigmoid(f) [excite] i = Mul(d, h)
    [c3] j = Conv(i, w4) [sum] k = Add(j, m) [r2] l = Relu(k)
    [head] n = GlobalAveragePool(l) [flat] o = Flatten(n) [fc] y = Gemm<transB = 1>(o, w5, b5)
}"""
CONCAT = """g (float[N, 3, 16, 16] x) => (float[] y)
    <float[4, 3, 3, 3] w1, float[4, 3, 3, 3] w2, float[6, 8, 1, 1] w3, float[6, 2, 2, 2] w4, float[5, 2, 1, 1] w5> {
    [c1] a = Conv<pads = [1, 1, 1, 1]>(x, w1) [r1] b = Relu(a) [c2] j = Conv<pads = [1, 1, 1, 1]>(x, w2) [r2] c = Relu(j) [k] d = Concat<axis = 1>(b, c)
    [c3] e = Conv(d, w3) [r3] f = Clip(e, zero, six) [up] h = ConvTranspose<strides = [2, 2]>(f, w4) [c5] y = Conv(h, w5)
}"""


@pytest.fixture
def feeds():
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(2, 3, 16, 16)).astype(np.float32)} for _ in range(4)]


def quantized(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], folder: Path, **options: object) -> Quantized:
    onnx.save(model, folder / "net.onnx")
    artifact = open_artifact(folder / "net.onnx")
    return quantize_onnx(artifact, calibration_set(artifact, feeds, None), QuantizeOptions(**options), cpu=True)


def kernels(model: ir.Model, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime makes of the graph."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.optimized_model_filepath = str(folder / "optimized.onnx")
    save_model(model, folder / "written.onnx")
    onnxruntime.InferenceSession(str(folder / "written.onnx"), settings, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def noise(model: ir.Model, exact: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> float:
    run, reference = CpuGraph(model), CpuGraph(ir.from_proto(exact))
    pairs = [(run(feed)["y"].astype(float), reference(feed)["y"].astype(float)) for feed in feeds]
    return sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(b).sum() for _, b in pairs)


def test_all_layers_sums_products_and_pools_have_kernels_on_codes(build, feeds, tmp_path):
    model = build(RESIDUAL)
    made = quantized(model, feeds, tmp_path)
    found = kernels(made.cpu.model, tmp_path)
    assert {name: found[name] for name in ("QLinearConv", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QGemm")} == {
        "QLinearConv": 4, "QLinearAdd": 1, "QLinearMul": 2, "QLinearSigmoid": 2, "QGemm": 1,
    }  # fmt: skip
    assert found["QLinearGlobalAveragePool"] == 2
    assert found["QuantizeLinear"] == 1
    assert not {"DequantizeLinear", "Conv", "FusedConv", "Add", "Mul", "Sigmoid", "Relu", "GlobalAveragePool"} & set(found)
    assert kernels(made.model, tmp_path)["QLinearConv"] < 4  # the signed graph is not computed so
    assert noise(made.cpu.model, model, feeds) < 2 * noise(made.model, model, feeds)
    assert noise(made.cpu.model, model, feeds) < 1e-2


def test_what_is_taken_off_before_a_convolution_is_in_the_zero_point(build, feeds, tmp_path):
    model = build(
        """g (float[N, 3, 16, 16] x) => (float[] y) <float[8, 3, 1, 1] w1, float[8, 8, 1, 1] w2, float[5, 8, 1, 1] w3, float[5] b3> {
            [c1] a = Conv(x, w1) [s] s = Sigmoid(a) [silu] b = Mul(a, s) [c2] c = Conv(b, w2) [t] t = Sigmoid(c) [gate] d = Mul(c, t)
            [c3] y = Conv(d, w3, b3) }"""
    )
    made = quantized(model, feeds, tmp_path)
    assert made.calibration.smoothed == ["b", "d"]
    assert sum(node.op_type == "Sub" for node in made.model.graph) == 2
    found = kernels(made.cpu.model, tmp_path)
    assert (found["QLinearConv"], found["QLinearMul"], found["Sub"]) == (2, 2, 0)  # the last gives floats
    assert 0 < made.cpu.chosen["d_quantized"][1] < 20
    assert noise(made.cpu.model, model, feeds) < 3 * noise(made.model, model, feeds)  # it rounds what layers give, too
    assert quantized(model, feeds, tmp_path, fp16=True).calibration.smoothed == []  # biases would be too large for FP16


def test_joined_codes_and_layers_without_a_kernel_are_right_too(build_with, parse, feeds, tmp_path):
    rng = np.random.default_rng(1)
    shapes = {"w1": (4, 3, 3, 3), "w2": (4, 3, 3, 3), "w3": (6, 8, 1, 1), "w4": (6, 2, 2, 2), "w5": (5, 2, 1, 1)}
    text = CONCAT.partition("<")[0] + CONCAT.partition("> {")[2].join(["{", ""])
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    model = build_with(text, **weights, zero=np.float32(0), six=np.float32(6))
    made = quantized(model, feeds, tmp_path)
    found = kernels(made.cpu.model, tmp_path)
    assert (found["QLinearConv"], found["Clip"], found["ConvTranspose"]) == (3, 0, 1)
    assert noise(made.cpu.model, model, feeds) < 1e-2


def test_the_floats_of_the_form_are_fp32_where_those_of_the_signed_graph_are_fp16(build, feeds, tmp_path):
    made = quantized(build(RESIDUAL), feeds, tmp_path, fp16=True)
    dtypes = [{value.dtype for value in model.graph.initializers.values()} for model in (made.model, made.cpu.model)]
    assert (ir.DataType.FLOAT16 in dtypes[0], ir.DataType.FLOAT16 in dtypes[1]) == (True, False)
    assert kernels(made.cpu.model, tmp_path)["QLinearConv"] == 4


def test_the_same_calibration_gives_the_same_form(build, feeds, tmp_path):
    model = build(RESIDUAL)
    first, second = (quantized(model, feeds, tmp_path).cpu.model for _ in range(2))
    assert ir.to_proto(first).SerializeToString(deterministic=True) == ir.to_proto(second).SerializeToString(deterministic=True)
