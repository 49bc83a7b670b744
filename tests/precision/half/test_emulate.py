import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploy.precision.cpu import CpuGraph
from deploy.precision.half.emulate import Emulate
from deploy.precision.half.rewrite import ToHalf
from tests.precision.conftest import cpu_graph, emulate, prepared, to_half

OVERFLOW = "g (float[N] x) => (float[N] y) { square = Mul(x, x) y = Sqrt(square) }"


def test_a_planted_overflow_shows_that_onnxruntime_hides(parse):
    half, _ = to_half(parse(OVERFLOW), "fp16")
    feed = {"x": np.array([3, 1000], dtype=np.float32)}
    assert cpu_graph(half)(feed)["y"].tolist() == [3, 1000]  # what makes the emulation necessary
    assert cpu_graph(emulate(half))(feed)["y"].tolist() == [3, np.inf]
    with np.errstate(over="ignore"):
        assert ReferenceEvaluator(half).run(None, feed)[0].tolist() == [3, np.inf]


def test_bf16_has_room_for_what_overflows_fp16(parse):
    half, _ = to_half(parse(OVERFLOW), "bf16")
    assert cpu_graph(emulate(half))({"x": np.array([3, 1024], dtype=np.float32)})["y"].tolist() == [3, 1024]


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize(("precision", "bits"), [("fp16", 11), ("bf16", 8)])
def test_onnxruntime_does_not_optimize_the_rounding_away(parse, precision, bits, level):
    # 0.9 of half the last place is lost every time, unless both additions are done before rounding.
    step = 0.9 * 2.0**-bits
    half, _ = to_half(
        parse(f"g (float[N] x) => (float[N] y) <float s = {{{step}}}> {{ a = Add(x, s) b = Add(a, s) y = Relu(b) }}"), precision
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(emulate(half).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones(4, dtype=np.float32)})[0].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_inputs_weights_and_results_are_rounded(parse, precision, dtype):
    half, _ = to_half(parse("g (float[N] x) => (float[N] y) <float[1] w = {0.3333333}> { y = Mul(x, w) }"), precision)
    x = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    exact = x.astype(dtype).astype(np.float32) * np.float32(dtype(0.3333333))
    np.testing.assert_array_equal(cpu_graph(emulate(half))({"x": x})["y"], exact.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        ("16", "k = Constant<value_ints = [16]>() r = Reshape(x, k) s = Sigmoid(r) y = Softmax(s)"),
        ("1, 1, 4, 4", "t = Transpose<perm = [0, 1, 3, 2]>(x) m = MatMul(x, t) y = Gelu(m)"),
        ("1, 2, 3, 3", "p = MaxPool<kernel_shape = [2, 2]>(x) c = Concat<axis = 1>(p, p) e = Exp(c) y = Log(e)"),
        ("1, 1, 4, 4", "m = ReduceMean(x) d = Sub(x, m) h = Constant<value_float = 3.1>() z = Clip(d, , h) y = Div(z, h)"),
    ],
)
def test_it_agrees_with_the_reference_implementation_of_onnx(parse, shape, body):
    half, exclusions = to_half(parse(f"g (float[1, 1, 4, 4] x) => (float[{shape}] y) {{ {body} }}"), "fp16")
    assert not exclusions
    feed = {"x": np.random.default_rng(1).standard_normal((1, 1, 4, 4), dtype=np.float32)}
    expected = ReferenceEvaluator(half).run(None, feed)[0]
    actual = cpu_graph(emulate(half))(feed)["y"]
    # The reference accumulates in FP16 and so is off by some units in the last place of its own.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4 * 2.0**-11 * np.abs(expected).max())


def test_inputs_and_outputs_keep_their_names_and_are_fp32_with_half_io_too(parse):
    text = "g (float[N] x) => (float[N] y, float[N] z, float[N] x) { y = Relu(x) z = Neg(y) }"
    for half_io in (False, True):
        emulated = emulate(to_half(parse(text), "fp16", half_io=half_io)[0])
        onnx.checker.check_model(emulated, full_check=True)
        assert [value.name for value in (*emulated.graph.input, *emulated.graph.output)] == ["x", "y", "z", "x"]
        feed = {"x": np.array([1e-9, 70000, 0.1], dtype=np.float32)}
        found = cpu_graph(emulated)(feed)
        assert found["y"].tolist() == [0, np.inf, float(np.float16(0.1))]
        assert found["z"].tolist() == [0, -np.inf, -float(np.float16(0.1))]


def test_nodes_left_in_fp32_are_not_rounded(parse):
    text = "g (float[N] x) => (float[N] y) { [s] square = Mul(x, x) [r] root = Sqrt(square) y = Neg(root) }"
    half, _ = to_half(parse(text), "fp16", keep={"s": "overflows", "r": "overflows"})
    assert cpu_graph(emulate(half))({"x": np.array([1000], dtype=np.float32)})["y"].tolist() == [-1000]


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_an_output_that_is_left_out_stays_out(parse, cell):
    """The last state alone, as classifiers of sequences take it."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[cell]
    model = parse(
        f"""g (float[T, 1, 3] x) => (float[1, 1, 5] h) <float[1, {5 * gates}, 3] w, float[1, {5 * gates}, 5] r>
        {{ k = Neg(x) all, h = {cell}<hidden_size = 5>(k, w, r) }}"""
    )
    rng = np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), value.name))
    del model.graph.value_info[:]
    feed = {"x": rng.standard_normal((4, 1, 3)).astype(np.float32)}
    expected = cpu_graph(model)(feed)["h"]
    half = prepared(model, opset=19)
    ToHalf("fp16")(half)
    RemoveUnusedNodesPass()(half)  # `all` has a type and no name then
    Emulate()(half)
    np.testing.assert_allclose(CpuGraph(half)(feed)["h"], expected, atol=1e-2)
