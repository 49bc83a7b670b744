import numpy as np
import pytest

from deploy.precision.half.guards import lost_guards
from deploy.precision.half.keep import nodes_to_keep
from deploy.precision.half.options import OPSET
from deploy.precision.ranges import activation_ranges
from tests.precision.conftest import cpu_graph, emulate, prepared, to_half

NORMALIZED = {
    "clip": "[l] l = ReduceMax<keepdims = 1>(x, axes) [g] g = Clip(l, e) [y] y = Div(x, g)",
    "max": "[l] l = ReduceMax<keepdims = 1>(x, axes) [g] g = Max(e, l) [y] y = Div(x, g)",
    "added": "[l] l = ReduceMax<keepdims = 1>(x, axes) [g] g = Add(l, e) [y] y = Div(x, g)",
    "reciprocal": "[l] l = ReduceMax<keepdims = 1>(x, axes) [g] g = Max(l, e) [r] r = Reciprocal(g) [y] y = Mul(x, r)",
    "root": "[l] l = ReduceMax<keepdims = 1>(x, axes) [g] g = Add(l, tiny) [s] s = Sqrt(g) [y] y = Div(x, s)",
    "in two branches that join": (
        "[l] l = ReduceMax<keepdims = 1>(x, axes) [g] g = Clip(l, e) [t] t = Identity(g) [u] u = Identity(g) [m] m = Mul(t, u)"
        " [s] s = Sqrt(m) [y] y = Div(x, s)"
    ),
    "behind a reshape": (
        "[l] l = ReduceMax<keepdims = 1>(x, axes) [g] g = Clip(l, e) [t] t = Expand(g, shape) [u] u = Identity(t) [y] y = Div(x, u)"
    ),
}


def graph(parse, body):
    return parse(
        "g (float[2, 3] x) => (float[2, 3] y) <float e = {1e-12}, float tiny = {1e-20}, int64[1] axes = {1}, int64[2] shape = {2, 3}>"
        f" {{ {body} }}"
    )


@pytest.mark.parametrize("body", NORMALIZED.values(), ids=NORMALIZED)
def test_a_guard_that_fp16_rounds_away_stays_with_all_up_to_what_it_guards(parse, body):
    model = graph(parse, body)
    feed = {"x": np.array([[0, 0, 0], [1, 2, 3]], dtype=np.float32)}
    expected = cpu_graph(model)(feed)["y"]
    assert np.isfinite(expected).all()
    source = prepared(model, opset=OPSET["fp16"])
    without, _ = to_half(model, "fp16")
    assert np.isnan(cpu_graph(emulate(without))(feed)["y"]).any(), "the fault that the guard is kept for"
    keep = nodes_to_keep(source, activation_ranges(source, [{"x": np.ones((2, 3), np.float32)}]), "fp16")
    half, _ = to_half(model, "fp16", keep=keep)
    np.testing.assert_allclose(cpu_graph(emulate(half))(feed)["y"], expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("guard", "precision", "lost"),
    [(1e-12, "fp16", True), (1e-8, "fp16", True), (1e-6, "fp16", False), (1e-5, "fp16", False), (1e-12, "bf16", False)],
)
def test_a_guard_is_lost_where_the_format_has_no_such_number(parse, guard, precision, lost):
    model = prepared(
        parse(f"g (float[2, 3] x) => (float[2, 3] y) <float e = {{{guard}}}> {{ [g] g = Clip(x, e) [y] y = Log(g) }}"),
        opset=OPSET[precision],
    )
    assert set(lost_guards(model, precision)) == ({"g", "y"} if lost else set())


def test_a_small_constant_that_guards_nothing_is_none(parse):
    text = "g (float[2, 3] x) => (float[2, 3] y) <float e = {1e-12}> { [g] g = Add(x, e) [r] r = Relu(g) [y] y = Neg(r) }"
    assert lost_guards(prepared(parse(text)), "fp16") == {}


def test_a_bias_that_vanishes_beside_what_it_is_added_to_costs_no_cast(parse):
    text = """g (float[2, 3] x) => (float[2, 3] y) <float[3] b = {4e-8, -3e-8, 2e-8}, float[3, 3] w = {1, 0, 0, 0, 1, 0, 0, 0, 1}>
        { [m] m = MatMul(x, w) [y] y = Add(m, b) }"""
    model = prepared(parse(text))
    beside_one = activation_ranges(model, [{"x": np.ones((2, 3), np.float32)}])
    assert nodes_to_keep(model, beside_one, "fp16") == {}
    beside_nothing = activation_ranges(model, [{"x": np.zeros((2, 3), np.float32)}])
    assert "y" in nodes_to_keep(model, beside_nothing, "fp16")


MASKS = {
    "-1e9, added": ("float low = {-1e9}", "[a] a = Mul(i, low) [t] t = Add(x, a)"),
    "the smallest float, added": ("float low = {-3.4028235e38}", "[a] a = Mul(i, low) [t] t = Add(x, a)"),
    "-1e9, through Where": ("float low = {-1e9}", "[t] t = Where(m, x, low)"),
    "the smallest float, through Where": ("float low = {-3.4028235e38}", "[t] t = Where(m, x, low)"),
}


@pytest.mark.parametrize(("low", "body"), MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_masks_of_attention_give_the_same_weights(parse, low, body, precision):
    model = parse(
        f"""g (float[2, 4] x, bool[2, 4] m) => (float[2, 4] y) <{low}, float one = {{1}}>
        {{ [f] f = Cast<to = 1>(m) [i] i = Sub(one, f) {body} [y] y = Softmax<axis = 1>(t) }}"""
    )
    feed = {
        "x": np.random.default_rng(0).standard_normal((2, 4), dtype=np.float32),
        "m": np.array([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=bool),
    }
    source = prepared(model, opset=OPSET[precision])
    keep = nodes_to_keep(source, activation_ranges(source, [feed]), precision)
    half, _ = to_half(model, precision, keep=keep)
    found, expected = cpu_graph(emulate(half))(feed)["y"], cpu_graph(model)(feed)["y"]
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert (found[~feed["m"]] == 0).all()
