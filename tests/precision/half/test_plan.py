import numpy as np
import pytest

from deploy.precision.half.options import OPSET
from deploy.precision.half.plan import plan_half, round_to
from tests.precision.conftest import prepared


def planned(model, precision="fp16"):
    graph = prepared(model, opset=OPSET[precision])
    plan = plan_half(graph, precision)
    return {node.name: (ports.inputs, ports.outputs) for node, ports in plan.half.items()}, plan.stay


def test_float_inputs_and_outputs_of_an_operator_are_in_half(parse):
    half, stay = planned(parse("g (float[N] x, bool[N] c) => (float[N] y) { [w] y = Where(c, x, x) }"))
    assert half == {"w": ((1, 2), (0,))}
    assert not stay


def test_inputs_whose_type_is_fixed_stay(parse):
    half, _ = planned(
        parse("g (float[N, 1, 4, 4] x, float[4] s) => (float[N, 1, a, b] y) { [r] y = Resize(x, , s) }"),
    )
    assert half == {"r": ((0,), (0,))}


def test_outputs_of_another_type_variable_stay(parse):
    half, _ = planned(
        parse(
            "g (float[N, 4] x, float[4] s) => (float[N, 4] y) { [n] y, mean, inv = LayerNormalization(x, s) [m] z = Add(mean, inv) }"
        )
    )
    assert half["n"] == ((0, 1), (0,))


def test_variadic_inputs_are_in_half_all_of_them(parse):
    half, _ = planned(parse("g (float[N, 1] x) => (float[N, 3] y) { [c] y = Concat<axis = 1>(x, x, x) }"))
    assert half["c"] == ((0, 1, 2), (0,))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[n] y = my.Foo(x)", "domain 'my'"),
        ("[n] y = RandomNormalLike(x)", "generates"),
        ("k = Constant<value_ints = [1]>() [n] y = ReduceL2(x, k)", "intermediate"),
        ("i = Constant<value_int = 0>() s = SequenceConstruct(x) [n] y = SequenceAt(s, i)", "not known to be a tensor"),
    ],
)
def test_nodes_that_cannot_run_in_half_are_named_with_the_reason(parse, body, reason):
    half, stay = planned(parse(f"g (float[N, 4] x, float[4, 4] q) => (float[a, b] y) {{ {body} }}"))
    assert reason in stay["n"]
    assert "n" not in half


def test_a_node_with_subgraphs_stays_whole(parse):
    model = parse(
        """g (float[N] x, bool c) => (float[N] y) {
            [if] y = If(c) <then_branch = t () => (float[N] a) { a = Relu(x) }, else_branch = e () => (float[N] b) { b = Neg(x) }>
        }"""
    )
    half, stay = planned(model)
    assert not half
    assert "subgraphs" in stay["if"]


def test_what_a_subgraph_makes_of_captured_data_is_data(parse):
    model = parse(
        """g (float[N] x) => (float[N] y) {
            c = Constant<value = bool {1}>()
            i = If(c) <then_branch = t () => (float[N] a) { a = Relu(x) }, else_branch = e () => (float[N] b) { b = Neg(x) }>
            [n] y = Neg(i)
        }"""
    )
    assert set(planned(model)[0]) == {"n"}


def test_arithmetic_on_sizes_stays_exact(parse):
    model = parse(
        """g (float[N, 3, H, W] x) => (float[N, 3, a, b] y) {
            size = Shape<start = 2>(x) wide = Cast<to = 1>(size) third = Constant<value_float = 0.333>()
            [scaled] s = Mul(wide, third) t = Floor(s) u = Cast<to = 7>(t)
            head = Shape<end = 2>(x) sizes = Concat<axis = 0>(head, u) [resize] y = Resize(x, , , sizes)
        }"""
    )
    half, stay = planned(model)
    assert set(half) == {"resize"}
    assert "shapes and constants" in stay["scaled"]


def test_weights_that_are_reshaped_while_running_are_in_half(parse):
    model = parse(
        "g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { [t] v = Transpose(w) [m] y = MatMul(x, v) }"
    )
    assert set(planned(model)[0]) == {"t", "m"}


def test_bf16_leaves_what_onnx_or_tensorrt_lacks(parse):
    model = parse(
        """g (float[N, 4] x, float[N, 1, 4, 4] i) => (float[N, 4] y, float[N, 1, 4, 4] z) {
            [e] a = Einsum<equation = "bi,bi->bi">(x, x) [h] y = HardSwish(a) [p] z = AveragePool<kernel_shape = [1, 1]>(i)
        }"""
    )
    assert set(planned(model, "fp16")[0]) == {"e", "h", "p"}
    half, stay = planned(model, "bf16")
    assert set(half) == {"p"}  # defined for BF16 since opset 22, which the graph is converted to
    assert stay["e"] == "Einsum has no BF16 form in opset 22"
    assert stay["h"] == "TensorRT has no HardSwish in BF16"


def test_rounding_is_to_nearest_even_and_overflow_is_infinite():
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 65519.9, 65520, -1e6, 2.0**-25], dtype=np.float32)
    assert round_to(values, "fp16").tolist() == [1.0, 1 + 2**-9, 65504.0, np.inf, -np.inf, 0.0]
    assert round_to(np.array([1 + 2**-8, 3.4e38], dtype=np.float32), "bf16").tolist() == [1.0, np.inf]
