"""Which tensors get pairs besides those of the signed graph, and means of maps as pools."""

import numpy as np
import onnx_ir as ir
import pytest

from deploy.precision.int8 import placement
from deploy.precision.int8.cpu_placement import MeansToPools, widened
from deploy.precision.int8.placement import Selection
from tests.precision.conftest import apply, cpu_graph

MAP = "float[2, 4, 8, 8] x"
WEIGHTS = "<float[4, 4, 1, 1] w, float[4, 4, 1, 1] v>"


def further(model, **selection):
    """The tensors with a pair in the wide placement alone, and all of it."""
    graph = ir.from_proto(model)
    signed = placement.place(graph, Selection(**selection))
    wide = widened(graph, signed)
    return {tensor for tensor in wide.edges if tensor not in signed.edges}, wide


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("[c] a = Conv(x, w) [r] b = Relu(a) [d] y = Conv(b, v)", set()),  # b has one already; y is an output
        ("[c] a = Conv(x, w) [t] b = Tanh(a) [d] y = Conv(b, v)", {"a"}),
        ("[c] a = Conv(x, w) [s] b = Add(a, x) [r] d = Relu(b) [d] y = Conv(d, v)", {"a"}),
        ("[c] a = Conv(x, w) [s] b = Add(a, x) [t] y = Tanh(b)", {"a", "b"}),
        ("[c] a = Conv(x, w) [s] b = Sigmoid(a) [m] d = Mul(a, b) [d] y = Conv(d, v)", {"a", "b"}),
        ("[c] a = Conv(x, w) [h] b = HardSigmoid(a) [m] d = Mul(x, b) [t] y = Tanh(d)", {"a", "b", "d"}),
        ("[c] a = Conv(x, w) [t] b = Tanh(a) [m] d = Mul(a, b) [t2] y = Tanh(d)", {"a"}),  # b is no gate
        ("[c] a = Conv(x, w) [p] b = MaxPool<kernel_shape = [2, 2]>(a) [d] y = Conv(b, v)", {"a"}),
        ("[c] a = Conv(x, w) [r] b = Relu(a) [p] d = GlobalAveragePool(b) [t] y = Tanh(d)", {"d"}),
        ("[c] y = Conv(x, w)", set()),
    ],
)
def test_what_is_computed_from_codes_gets_codes(build, body, expected):
    assert further(build(f"g ({MAP}) => (float[] y) {WEIGHTS} {{ {body} }}"))[0] == expected


def test_all_that_read_a_tensor_read_its_codes(build):
    model = build(f"g ({MAP}) => (float[] y, float[] z) {WEIGHTS} {{ [c] a = Conv(x, w) [d] y = Conv(a, v) [t] z = Tanh(a) }}")
    _, wide = further(model)
    assert wide.edges["a"] == (("d", 0), ("t", 0))


def test_outputs_of_matrices_stay_floats(build):
    model = build(
        "g (float[2, 4] x) => (float[] y) <float[4, 4] w, float[4] b, float[4, 4] v> {"
        " [g] a = Gemm(x, w, b) [s] d = Add(a, x) [m] y = MatMul(d, v) }"
    )
    assert further(model)[0] == set()


@pytest.mark.parametrize(
    ("body", "exclude", "weights", "edges"),
    [
        ("[c] a = Conv(x, w) [d] y = Conv(a, v)", "d", set(), set()),
        (
            "[c] a = Conv(x, w) [r] b = Relu(a) [d] e = Conv(b, v) [t] f = Tanh(e) [k] y = Conv(f, w)",
            "k",
            {"c", "d"},
            {"x", "b", "e"},
        ),
        ("[c] a = Conv(x, w) [r] b = Relu(a) [d] e = Conv(b, v) [k] y = Conv(e, w)", "k", {"c"}, {"x", "b"}),
        ("[c] a = Conv(x, w) [d] y = Conv(a, v)", "", {"c"}, {"x", "a"}),
    ],
    ids=["alone", "with another reader", "made of codes", "output"],
)
def test_a_layer_that_has_no_kernel_keeps_its_weight_in_floating_point(build, body, exclude, weights, edges):
    """Its input is rounded all the same where the layer before makes codes."""
    model = build(f"g ({MAP}) => (float[] y) {WEIGHTS} {{ {body} }}")
    _, wide = further(model, exclude=tuple(filter(None, [exclude])))
    assert set(wide.weights) == set(wide.nodes) == weights
    assert set(wide.edges) == edges


@pytest.mark.parametrize(
    ("behind", "kernels"),
    [
        ("[r] e = Relu(a) [h] y = MatMul(e, v)", set()),
        ("[r] e = Clip(a, l) [h] y = MatMul(e, v)", set()),
        ("[t] e = Tanh(a) [h] y = MatMul(e, v)", {"g"}),
        ("[h] y = MatMul(a, v)", {"g"}),
        ("[r] y = Relu(a)", {"g"}),
    ],
)
def test_a_matrix_has_no_kernel_where_an_activation_alone_is_before_floating_point(build, behind, kernels):
    weights = "<float[4, 4] w, float[4] b, float[4, 4] v, float l>"
    model = build(f"g (float[2, 4] x) => (float[] y) {weights} {{ [g] a = Gemm(x, w, b) {behind} }}")
    exclude = ("h",) if "[h]" in behind else ()
    assert set(further(model, exclude=exclude)[1].weights) == kernels


def test_a_layer_that_is_left_in_floating_point_gets_no_codes(build):
    model = build(f"g ({MAP}) => (float[] y) {WEIGHTS} {{ [c] a = Conv(x, w) [t] b = Tanh(a) [d] y = Conv(b, v) }}")
    assert further(model, exclude=("c",))[0] == set()


def test_a_pool_that_is_left_in_floating_point_gets_no_codes(build):
    model = build(f"g ({MAP}) => (float[] y) {WEIGHTS} {{ [c] a = Conv(x, w) [p] b = GlobalAveragePool(a) [t] y = Tanh(b) }}")
    assert further(model)[0] == {"b"}
    assert further(model, exclude=("p",))[0] == set()


def test_numbers_that_only_move_share_a_scale(build):
    body = "[c] a = Conv(x, w) [p] b = MaxPool<kernel_shape = [2, 2]>(a) [i] d = Identity(b) [d] e = Conv(d, v) [t] y = Tanh(e)"
    _, wide = further(build(f"g ({MAP}) => (float[] y) {WEIGHTS} {{ {body} }}"))
    assert [set(group) for group in wide.groups] == [{"a", "b", "d"}]


@pytest.mark.parametrize(("keep", "axes", "operators"), [(1, [2, 3], 1), (0, [-1, -2], 1), (1, [1, 2], 0), (0, [3], 0)])
def test_means_over_all_places_become_pools_and_others_stay(build_with, keep, axes, operators):
    model = build_with(
        f"g ({MAP}) => (float[] y) {{ [m] a = ReduceMean<keepdims = {keep}>(x, axes) [t] y = Tanh(a) }}", axes=np.array(axes)
    )
    pooled = apply(MeansToPools(), model)
    assert sum(node.op_type == "GlobalAveragePool" for node in pooled.graph.node) == operators
    feed = {"x": np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)}
    np.testing.assert_allclose(cpu_graph(pooled)(feed)["y"], cpu_graph(model)(feed)["y"], rtol=0, atol=1e-6)


def test_a_sum_that_is_left_in_floating_point_reads_and_makes_no_codes(build):
    model = build(
        f"g ({MAP}) => (float[] y, float[] z) {WEIGHTS} {{"
        " [c] a = Conv(x, w) [s] b = Add(a, x) [d] y = Conv(a, v) [t] z = Tanh(b) }"
    )
    assert further(model)[1].edges.keys() == {"x", "a", "b"}
    _, wide = further(model, exclude=("s",))
    assert (wide.edges.keys(), wide.edges["a"]) == ({"x", "a"}, (("d", 0),))
