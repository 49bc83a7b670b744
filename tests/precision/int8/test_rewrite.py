"""What is written, and that ONNX Runtime, OpenVINO and TensorRT-RTX take it as it stands."""

import tempfile

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, numpy_helper

import deploy
from deploy.artifact.tensors import ShapeRange
from deploy.engine.attestation import network_share
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import load_flavour
from deploy.errors import PrecisionError
from deploy.precision.int8.placement import Selection
from deploy.precision.macs import count_macs
from tests.precision.conftest import cpu_graph, fold_batchnorm, place, prepare, to_half, to_int8

RNG = np.random.default_rng(3)
CONV = """g (float[2, 4, 8, 8] x) => (float[2, 6, 8, 8] y) <float[6, 4, 1, 1] w, float[6] b> {
    [conv] a = Conv(x, w, b) [relu] y = Relu(a)
}"""


@pytest.fixture(autouse=True)
def same_numbers_whichever_tests_run(monkeypatch):
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(3))


def nodes(model):
    return {node.name: node for node in model.graph.node}


def stored(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def normal_feed(model):
    shapes = {value.name: [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def max_scales(model, placement, feed):
    """Scales from the largest magnitudes that `feed` makes."""
    graph = onnx_ir.from_proto(model)
    made = {value.name: value for node in graph.graph for value in node.outputs}
    known = {value.name for value in (*graph.graph.inputs, *graph.graph.outputs)}
    graph.graph.outputs.extend(made[tensor] for tensor in placement.edges if tensor not in known)
    tensors = cpu_graph(onnx_ir.to_proto(graph))(feed) | feed
    scales = {tensor: float(np.abs(tensors[tensor]).max()) / 127 or 1.0 for tensor in placement.edges}
    for group in placement.groups:
        scales |= dict.fromkeys(group, max(scales[tensor] for tensor in group))
    return scales


def run_openvino(model, feed):
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, f"{folder}/model.onnx")
        with deploy.load(f"{folder}/model.onnx", "openvino") as session:
            return session.run(feed)


def cosine(first, second):
    return float(first.ravel() @ second.ravel() / np.linalg.norm(first) / np.linalg.norm(second))


def assert_runs_everywhere(model, quantized, feed, least):
    expected = cpu_graph(model)(feed)
    for results in (cpu_graph(quantized)(feed), run_openvino(quantized, feed)):
        for name, value in expected.items():
            assert cosine(value, results[name]) > least


def precision_in_tensorrt_rtx(model, feed, tmp_path):
    """Build an engine; the precision by node."""
    rtx = load_flavour("tensorrt-rtx")
    onnx.save(model, tmp_path / "model.onnx")
    profile = {name: ShapeRange(min=array.shape, opt=array.shape, max=array.shape) for name, array in feed.items()}
    built = build_engine(rtx, tmp_path / "model.onnx", [profile], BuildOptions())
    macs = count_macs(onnx_ir.load(tmp_path / "model.onnx"), {name: array.shape for name, array in feed.items()})
    return network_share(built.network.definition, rtx.trt, macs)[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_with_the_node(build, bad):
    model = build(CONV)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    array = numpy_helper.to_array(weight).copy()
    array[1, 2] = bad
    weight.CopyFrom(numpy_helper.from_array(array, "w"))
    with pytest.raises(PrecisionError, match="'w' of 'conv': a weight has NaN or infinity"):
        to_int8(model, place(model, Selection()), {"x": 0.1})


def test_pairs_and_int8_weights_stand_where_they_should(build):
    model = build(CONV)
    before = model.SerializeToString(deterministic=True)
    quantized = to_int8(model, place(model, Selection()), {"x": 0.05})
    onnx.checker.check_model(quantized, full_check=True)
    assert model.SerializeToString(deterministic=True) == before
    found = nodes(quantized)
    assert list(found) == ["w/DequantizeLinear", "x/QuantizeLinear", "x/DequantizeLinear", "conv", "relu"]
    assert list(found["x/QuantizeLinear"].output) == ["x_quantized"]
    assert list(found["conv"].input) == ["x_dequantized", "w_dequantized", "b"]
    assert [attribute.i for attribute in found["w/DequantizeLinear"].attribute] == [0]
    arrays = stored(quantized)
    assert set(arrays) == {"x_scale", "int8_zero_point", "w_int8", "w_scale", "w_zero_point", "b"}
    assert (arrays["w_int8"].dtype, arrays["w_scale"].shape, arrays["b"].dtype) == (np.int8, (6,), np.float32)
    assert arrays["x_scale"] == np.float32(0.05)
    for name in ("int8_zero_point", "w_zero_point"):
        assert (arrays[name].dtype, not arrays[name].any()) == (np.int8, True)


def test_one_scale_for_each_weight_when_asked_for(build):
    model = build(CONV)
    quantized = to_int8(model, place(model, Selection()), {"x": 0.05}, per_tensor=True)
    assert stored(quantized)["w_scale"].shape == ()
    assert not nodes(quantized)["w/DequantizeLinear"].attribute


def test_no_scale_of_a_weight_is_below_the_smallest(build):
    model = build(CONV)
    assert (stored(to_int8(model, place(model, Selection()), {"x": 0.05}, smallest=0.5))["w_scale"] == 0.5).all()


def test_a_shared_weight_is_stored_once_and_the_float_one_stays_only_where_it_is_used(build):
    model = build(
        """g (float[2, 4, 8, 8] x) => (float[2, 4, 8, 8] y) <float[4, 4, 1, 1] w> {
            [one] a = Conv(x, w) [two] b = Conv(a, w) [three] y = Conv(b, w)
        }"""
    )
    quantized = to_int8(model, place(model, Selection(exclude=("two",))), {"x": 0.05, "b": 0.05})
    found = nodes(quantized)
    assert found["one"].input[1] == found["three"].input[1] == "w_dequantized"
    assert found["two"].input[1] == "w"
    assert sum(tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 4 for tensor in quantized.graph.initializer) == 1
    assert "w" not in stored(to_int8(model, place(model, Selection()), dict.fromkeys(("x", "a", "b"), 0.05)))


def test_a_tensor_has_one_pair_for_all_that_take_it_quantized(build):
    model = build(
        """g (float[2, 4, 8, 8] x) => (float[2, 4, 8, 8] y, float[2, 4, 8, 8] r) <float[4, 4, 1, 1] w, float[4, 4, 1, 1] v> {
            r = Relu(x) [one] a = Conv(r, w) [add] b = Add(a, r) [two] c = Conv(r, v) [plain] s = Neg(r) d = Mul(s, c) y = Mul(b, d)
        }"""
    )
    quantized = to_int8(model, place(model, Selection()), {"r": 0.05})
    found = nodes(quantized)
    assert found["one"].input[0] == found["add"].input[1] == found["two"].input[0] == "r_dequantized"
    assert found["plain"].input[0] == "r"
    assert [output.name for output in quantized.graph.output] == ["y", "r"]


def test_a_correction_is_added_to_the_bias_or_becomes_one(build):
    model = build(
        """g (float[2, 4, 8, 8] x) => (float[2, 5, 8, 3] y) <float[4, 4, 1, 1] w, float[4] b, float[5, 4, 1, 1] v, float[8, 3] m> {
            [with] a = Conv(x, w, b) [without] c = Conv(a, v) [product] y = MatMul(c, m)
        }"""
    )
    placement = place(model, Selection())
    scales = dict.fromkeys(("x", "a", "c"), 0.05)
    shifts = {"with": np.full(4, 0.5), "without": np.arange(5), "product": np.array([1, 2, 3])}
    corrected = to_int8(model, placement, scales, bias=shifts)
    arrays, found = stored(corrected), nodes(corrected)
    np.testing.assert_allclose(arrays[found["with"].input[2]], stored(model)["b"] + 0.5, rtol=1e-6)
    assert arrays[found["without"].input[2]].tolist() == [0, 1, 2, 3, 4]
    assert found["product/bias_correction"].output[0] == "y"
    assert "b" not in arrays
    feed = normal_feed(model)
    only_last = to_int8(model, placement, scales, bias={"product": shifts["product"]})
    plain = to_int8(model, placement, scales)
    np.testing.assert_allclose(cpu_graph(only_last)(feed)["y"], cpu_graph(plain)(feed)["y"] + [1, 2, 3], rtol=1e-5, atol=1e-4)
    with pytest.raises(PrecisionError, match="no node is named 'nope'"):
        to_int8(model, placement, scales, bias={"nope": np.zeros(4)})


@pytest.mark.parametrize("scale", [None, 0.0, -1.0, np.nan, np.inf, 1e-60])
def test_a_scale_that_is_missing_or_not_positive_is_refused(build, scale):
    model = build(CONV)
    with pytest.raises(PrecisionError, match="the scale of 'x' is"):
        to_int8(model, place(model, Selection()), {} if scale is None else {"x": scale})


def test_channels_that_are_all_bias_keep_it_on_every_runtime(build):
    """ONNX Runtime stores a bias in units of the product of the scales: with a tiny one it would overflow."""
    model = build(
        """g (float[2, 4, 8, 8] x) => (float[2, 6, 8, 8] y) <float[6, 4, 1, 1] w, float[6, 6, 1, 1] v, float[6] b> {
            [one] a = Conv(x, w, b) [relu] r = Relu(a) [two] y = Conv(r, v)
        }"""
    )
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    weight = numpy_helper.to_array(arrays["w"]).copy()
    weight[0], weight[1] = 0, weight[1] * 1e-12
    arrays["w"].CopyFrom(numpy_helper.from_array(weight, "w"))
    arrays["b"].CopyFrom(numpy_helper.from_array(np.full(6, 3, dtype=np.float32), "b"))
    placement, feed = place(model, Selection()), normal_feed(model)
    scales = max_scales(model, placement, feed)
    assert_runs_everywhere(model, to_int8(model, placement, scales), feed, 0.999)
    assert_runs_everywhere(model, to_int8(model, placement, scales, per_tensor=True), feed, 0.999)


CONCATENATED = """g (float[2, 4, 8, 8] x) => (float[] y, float[2, 8, 8, 8] c) <float[6, 8, 3, 3] w, float[3, 12, 1, 1] v> {
    s = Tanh(x) [cat1] c = Concat<axis = 1>(x, s) p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c) [one] a = Conv<pads = [1, 1, 1, 1]>(p, w)
    t = Tanh(a) [cat2] d = Concat<axis = 1>(a, t) [two] y = Conv(d, v)
}"""


def test_a_concatenation_of_quantized_branches_joins_codes(build):
    model = build(CONCATENATED)
    placement, feed = place(model, Selection()), normal_feed(model)
    quantized = to_int8(model, placement, max_scales(model, placement, feed))
    found = nodes(quantized)
    assert list(found["cat2"].input) == ["a_quantized", "t_quantized"]
    assert list(found["cat2"].output) == ["d_quantized"]
    assert list(found["d/DequantizeLinear"].output) == ["d"]
    assert found["two"].input[0] == "d"
    assert "a/DequantizeLinear" not in found
    assert [output.name for output in quantized.graph.output] == ["y", "c"]
    assert_runs_everywhere(model, quantized, feed, 0.999)


FORMS = {
    "conv1d": "g (float[2, 4, 16] x) => (float[] y) <float[8, 4, 3] w> { [n] y = Conv(x, w) }",
    "depthwise": "g (float[2, 4, 8, 8] x) => (float[] y) <float[8, 1, 3, 3] w> { [n] y = Conv<group = 4>(x, w) }",
    "conv3d": "g (float[2, 4, 8, 8, 8] x) => (float[] y) <float[8, 4, 3, 3, 3] w> { [n] y = Conv(x, w) }",
    "transposed": "g (float[2, 4, 8, 8] x) => (float[] y) <float[4, 8, 3, 3] w, float[8] b> { [n] y = ConvTranspose<strides = [2, 2]>(x, w, b) }",
    "transposed in groups": "g (float[2, 4, 8, 8] x) => (float[] y) <float[4, 4, 3, 3] w> { [n] y = ConvTranspose<group = 2>(x, w) }",
    "transposed 1d": "g (float[2, 4, 16] x) => (float[] y) <float[4, 8, 3] w> { [n] y = ConvTranspose(x, w) }",
    "gemm": "g (float[2, 4] x) => (float[] y) <float[4, 8] w, float[8] b> { [n] y = Gemm(x, w, b) }",
    "gemm transposed": "g (float[2, 4] x) => (float[] y) <float[8, 4] w, float[8] b> { [n] y = Gemm<transB = 1>(x, w, b) }",
    "matmul": "g (float[2, 5, 4] x) => (float[] y) <float[4, 8] w> { [n] y = MatMul(x, w) }",
    "stacked matmul": "g (float[2, 5, 4] x) => (float[] y) <float[2, 4, 8] w> { [n] y = MatMul(x, w) }",
    "attention": "g (float[2, 5, 4] x) => (float[] y) { t = Transpose<perm = [0, 2, 1]>(x) [n] y = MatMul(x, t) }",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_layer_runs_in_int8_everywhere(build, form, tmp_path):
    model = build(FORMS[form])
    placement, feed = place(model, Selection()), normal_feed(model)
    quantized = to_int8(model, placement, max_scales(model, placement, feed))
    assert_runs_everywhere(model, quantized, feed, 0.999)
    assert precision_in_tensorrt_rtx(quantized, feed, tmp_path) == {"n": "int8"}


@pytest.mark.parametrize("per_tensor", [False, True])
def test_with_scales_in_fp16_no_casts_stand_between_the_layers(build, tmp_path, per_tensor):
    model = build(
        """g (float[2, 4, 8, 8] x) => (float[] y) <float[6, 4, 3, 3] w, float[6, 5, 2, 2] v, float[5] b> {
            [one] a = Conv(x, w) r = Relu(a) [two] c = ConvTranspose(r, v, b) [cat] d = Concat<axis = 1>(c, c) y = Relu(d)
        }"""
    )
    placement, feed = place(model, Selection()), normal_feed(model)
    mixed, _ = to_half(to_int8(model, placement, max_scales(model, placement, feed), per_tensor=per_tensor), "fp16")
    operators = [node.op_type for node in mixed.graph.node]
    assert (operators[0], operators[-1], operators.count("Cast")) == ("Cast", "Cast", 2)
    assert precision_in_tensorrt_rtx(mixed, feed, tmp_path) == {"one": "int8", "two": "int8"}


@pytest.mark.parametrize("arch", ["mlp", "resnet18", "mobilenet_v1", "rangeseg"])
def test_exported_architectures_run_in_int8_everywhere(arch, reference, tmp_path):
    model = fold_batchnorm(prepare(onnx.load(reference(arch).onnx_path), opset=19))
    placement, feed = place(model, Selection()), normal_feed(model)
    quantized = to_int8(model, placement, max_scales(model, placement, feed))
    assert placement.excluded == ()
    assert len(quantized.SerializeToString()) < 0.3 * len(model.SerializeToString())
    assert_runs_everywhere(model, quantized, feed, 0.995)
    assert set(precision_in_tensorrt_rtx(quantized, feed, tmp_path).values()) == {"int8"}
