"""What stays together, on graphs made by hand."""

import onnx_ir as ir
import pytest

from deploy.precision.int8.placement import Placement, Selection, place
from deploy.tune.units import Unit, units_of
from tests.precision.conftest import parse as parse
from tests.precision.conftest import prepared
from tests.precision.int8.conftest import build as build

SIZES = {"x": (1, 4, 8, 8)}


def named(proto) -> ir.Model:
    """The model, prepared; the text form has no slashes in names: two underscores stand for one."""
    for node in proto.graph.node:
        node.name = node.name.replace("__", "/")
    return prepared(proto, opset=19)


def found(proto, sizes=SIZES, **selection) -> tuple[list[tuple[str, tuple[str, ...]]], list[tuple[str, str, int]]]:
    """The units by name with their nodes, and the crossings by the names of their units with the size of the tensor."""
    model = named(proto)
    placement: Placement = place(model, Selection(**selection))
    units, crossings = units_of(model, placement, sizes)
    names = [unit.name for unit in units]
    return (
        [(unit.name, unit.nodes) for unit in units],
        sorted((names[pair.units[0]], names[pair.units[1]], pair.elements) for pair in crossings),
    )


def test_a_residual_sum_is_with_the_layer_that_makes_it_and_its_skip_is_a_crossing(build):
    units, crossings = found(
        build(
            """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) <float[4, 4, 1, 1] w1, float[4, 4, 1, 1] w2, float[4] b> {
                [stem] a = Conv(x, w1) [relu0] s = Relu(a)
                [conv1] c = Conv(s, w1) [relu1] d = Relu(c)
                [conv2] e = Conv(d, w2, b) [add] f = Add(e, s) [relu2] y = Relu(f)
            }"""
        )
    )
    assert units == [("stem", ("stem",)), ("conv1", ("conv1",)), ("conv2", ("conv2", "add"))]
    assert crossings == [("conv1", "conv2", 256), ("stem", "conv1", 256), ("stem", "conv2", 256)]


def test_pools_are_with_the_layer_before_them_or_else_behind_them(build):
    units, crossings = found(
        build(
            """g (float[N, 4, 8, 8] x) => (float[N, 5] y) <float[4, 4, 1, 1] w, float[4, 5] m> {
                [first] p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(x)
                [conv] a = Conv(p, w) r = Relu(a) [pool] g = GlobalAveragePool(r) f = Flatten(g) [head] y = Gemm(f, m)
            }"""
        )
    )
    assert units == [("conv", ("first", "conv", "pool")), ("head", ("head",))]
    assert crossings == [("conv", "head", 4)]


def test_tensors_of_a_shared_scale_keep_their_readers_together(build):
    units, _ = found(
        build(
            """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) <float[4, 4, 1, 1] w, float[4, 8, 1, 1] v> {
                [left] a = Conv(x, w) [right] b = Conv(x, w) [cat] c = Concat<axis = 1>(a, b) [conv] y = Conv(c, v)
            }"""
        )
    )
    assert units == [("left", ("left", "right", "cat", "conv"))]


ATTENTION = """g (float[N, 6, 8] x) => (float[N, 6, 8] y)
    <float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[8, 8] wo, float[8, 8] w1> {
        [attn_q__MatMul] q = MatMul(x, wq) [attn_k__MatMul] k = MatMul(x, wk) [attn_v__MatMul] v = MatMul(x, wv)
        [t] kt = Transpose<perm = [0, 2, 1]>(k) [qk] s = MatMul(q, kt) [soft] p = Softmax(s) [pv] o = MatMul(p, v)
        [attn_out__MatMul] a = MatMul(o, wo) [res] r = Add(a, x) [mlp__MatMul] y = MatMul(r, w1)
}"""


@pytest.mark.parametrize("include", [(), ("qk", "pv")])
def test_attention_is_whole_whether_its_products_are_quantized_or_not(build, include):
    units, crossings = found(build(ATTENTION), {"x": (1, 6, 8)}, include=include)
    assert [name for name, _ in units] == ["attn_q", "mlp"]
    assert set(units[0][1]) == {"attn_q/MatMul", "attn_k/MatMul", "attn_v/MatMul", "attn_out/MatMul", *include}
    assert crossings == []  # between them is a sum in floating point


def test_a_bias_and_an_activation_are_crossed_and_a_norm_is_not(build):
    text = """g (float[N, 6, 8] x) => (float[N, 6, 8] y) <float[8, 8] w1, float[8, 8] w2, float[8] b> {{
        [fc1] a = MatMul(x, w1) [bias] c = Add(a, b) [act] d = {} [fc2] y = MatMul(d, w2)
    }}"""
    assert found(build(text.format("Relu(c)")), {"x": (1, 6, 8)})[1] == [("fc1", "fc2", 48)]
    assert found(build(text.format("Softmax(c)")), {"x": (1, 6, 8)})[1] == []


def test_units_have_names_of_their_own_and_their_share_of_the_work(build):
    model = named(
        build(
            """g (float[N, 4, 8, 8] x) => (float[N, 2, 8, 8] y) <float[4, 4, 3, 3] w, float[2, 4, 3, 3] v> {
                [block__Conv] a = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(a) [block__Conv_1] y = Conv<pads = [1, 1, 1, 1]>(r, v)
            }"""
        )
    )
    units, _ = units_of(model, place(model, Selection()), SIZES)
    assert units == (
        Unit(name="block/Conv", nodes=("block/Conv",), macs=2 / 3),
        Unit(name="block/Conv_1", nodes=("block/Conv_1",), macs=1 / 3),
    )


def test_what_is_excluded_is_in_no_unit_and_crossings_go_through_it(build):
    units, crossings = found(
        build(
            """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) <float[4, 4, 1, 1] w> {
                [a] p = Conv(x, w) [b] q = Conv(p, w) [c] y = Conv(q, w)
            }"""
        ),
        exclude=("b",),
    )
    assert [name for name, _ in units] == ["a", "c"]
    assert crossings == []  # a layer in floating point stands between them
