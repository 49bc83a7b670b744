"""Unsigned codes and INT32 biases: the same numbers as the signed graph, or finer ones."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploy.precision.int8.placement import Selection
from deploy.precision.int8.unsigned import MIDDLE, ToUnsigned, finest
from tests.precision.conftest import apply, cpu_graph, place, to_int8

CONV = "g (float[2, 4, 8, 8] x) => (float[] y) <float[6, 4, 1, 1] w, float[6] b> { [c] y = Conv(x, w, b) }"


def unsigned(model, scales, lows):
    signed = to_int8(model, place(model, Selection()), scales)
    return signed, apply(ToUnsigned(lows), signed)


def stored(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def parameters(model, operator="QuantizeLinear"):
    """Scale and zero point by the tensor that a pair reads."""
    constants = stored(model)
    return {
        node.input[0]: (float(constants[node.input[1]]), int(constants[node.input[2]]))
        for node in model.graph.node
        if node.op_type == operator and node.input[0] not in constants
    }


def feed(size=(2, 4, 8, 8)):
    return {"x": np.random.default_rng(0).normal(size=size).astype(np.float32)}


@pytest.mark.parametrize(
    ("low", "expected"),
    [
        (0.0, (0.1 * 127 / 255, 0)),
        (3.0, (0.1 * 127 / 255, 0)),  # zero itself must have a code
        (-12.7, (0.1, MIDDLE)),
        (-99.0, (0.1, MIDDLE)),
        (None, (0.1, MIDDLE)),
        (-0.3, (13 / 255, 6)),
    ],
)
def test_the_codes_are_spread_over_what_there_is(low, expected):
    assert finest(0.1, low) == pytest.approx(expected, rel=1e-6)


def test_without_a_known_low_the_numbers_are_those_of_the_signed_graph(build):
    model = build("g (float[2, 4] x) => (float[] y) <float[4, 3] w> { [m] y = MatMul(x, w) }")
    signed, made = unsigned(model, {"x": 0.02}, {})
    x = feed((2, 4))
    assert parameters(made) == {"x": (pytest.approx(0.02), MIDDLE)}
    assert cpu_graph(made)(x)["y"].tobytes() == cpu_graph(signed)(x)["y"].tobytes()


def test_behind_a_relu_the_steps_are_half_as_large_and_so_is_the_error(build):
    model = build("g (float[2, 4] x) => (float[] y) <float[4, 8] w> { [r] a = Relu(x) [m] y = MatMul(a, w) }")
    x = feed((2, 4))
    exact, scale = cpu_graph(model)(x)["y"], float(x["x"].max()) / 127
    signed, made = unsigned(model, {"a": scale}, {"a": 0.0})
    assert parameters(made)["a"] == (pytest.approx(scale * 127 / 255), 0)
    assert np.square(cpu_graph(made)(x)["y"] - exact).sum() < np.square(cpu_graph(signed)(x)["y"] - exact).sum()


def test_biases_are_stored_in_steps_of_both_scales(build):
    model = build(CONV)
    made = unsigned(model, {"x": 0.03}, {"x": -4.0})[1]
    constants = stored(made)
    node = next(
        node for node in made.graph.node if node.output[0] == next(n for n in made.graph.node if n.op_type == "Conv").input[2]
    )
    codes, scale = (constants[name] for name in node.input)
    assert codes.dtype == np.int32
    np.testing.assert_allclose(scale, parameters(made)["x"][0] * constants["w_scale"], rtol=1e-6)
    assert (
        np.abs(codes * scale - numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "b"))) <= 0.5001 * scale
    ).all()


def test_a_huge_bias_keeps_its_value(build_with):
    text = "g (float[2, 4, 8, 8] x) => (float[] y) { [r] a = Relu(x) [c] y = Conv(a, w, b) }"
    weight = np.full((2, 4, 1, 1), 1e-6, dtype=np.float32)
    model = build_with(text, w=weight, b=np.array([1e4, -1e4], dtype=np.float32))
    made = unsigned(model, {"a": 0.01}, {"a": 0.0})[1]
    assert parameters(made)["a"][0] < 0.005  # steps are half as large all the same
    np.testing.assert_allclose(cpu_graph(made)(feed())["y"], cpu_graph(model)(feed())["y"], rtol=1e-5)


def test_a_computed_bias_and_one_that_differs_by_row_stay_floats(build):
    model = build("g (float[2, 4] x) => (float[] y) <float[4, 3] w, float[2, 3] b> { [m] y = Gemm(x, w, b) }")
    made = unsigned(model, {"x": 0.02}, {"x": -3.0})[1]
    assert next(node for node in made.graph.node if node.op_type == "Gemm").input[2] == "b"


def test_what_a_concat_joins_has_one_scale(build):
    model = build(
        "g (float[2, 4, 8, 8] x) => (float[] y) <float[6, 8, 1, 1] w> {"
        " [r] a = Relu(x) [t] b = Tanh(x) [k] d = Concat<axis = 1>(a, b) [c] y = Conv(d, w) }"
    )
    scales = dict.fromkeys(("a", "b", "d"), 0.03)
    made = unsigned(model, scales, {"a": 0.0, "b": -1.0, "d": -1.0})[1]  # lows of tensors that do not agree
    assert parameters(made) == dict.fromkeys(("a", "b"), (pytest.approx(0.03), MIDDLE))
    assert parameters(made, "DequantizeLinear") == {"d_quantized": (pytest.approx(0.03), MIDDLE)}
    agreeing = unsigned(model, scales, dict.fromkeys(("a", "b", "d"), -1.0))[1]
    assert len(set(parameters(agreeing).values())) == 1
    assert parameters(agreeing)["a"][1] < MIDDLE - 1
    np.testing.assert_allclose(cpu_graph(agreeing)(feed())["y"], cpu_graph(model)(feed())["y"], rtol=0, atol=0.2)
    onnx.checker.check_model(made, full_check=True)
