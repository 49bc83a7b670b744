"""Each rule on a hand-made graph."""

import onnx
import pytest

from deploy.errors import PrecisionError
from deploy.precision.int8.placement import Selection, Weight
from tests.precision.conftest import place

RESIDUAL = """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) <float[4, 4, 1, 1] w1, float[4, 4, 1, 1] w2, float[4] b> {
    [stem] a = Conv(x, w1) [relu0] s = Relu(a)
    [conv1] c = Conv(s, w1) [relu1] d = Relu(c)
    [conv2] e = Conv(d, w2, b) [add] f = Add(e, s) [relu2] y = Relu(f)
}"""


def reasons(placement):
    return {exclusion.node: exclusion.reason for exclusion in placement.excluded}


def test_the_input_of_a_layer_is_quantized_and_nothing_between_it_and_its_activation(build):
    placement = place(
        build("g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) <float[4, 3, 1, 1] w> { [c] a = Conv(x, w) y = Relu(a) }"),
        Selection(),
    )
    assert placement.nodes == ("c",)
    assert placement.edges == {"x": (("c", 0),)}
    assert placement.weights == {"c": Weight(initializer="w", axis=0)}
    assert placement.groups == placement.excluded == ()


def test_branches_of_a_concatenation_that_is_taken_quantized_share_a_scale(build):
    model = build(
        """g (float[N, 4, 8, 8] x, float[N, 4, 8, 8] z) => (float[N, 4, 8, 8] y, float[N, 8, 8, 8] k) <float[4, 8, 1, 1] w> {
            a = Sigmoid(x) b = Tanh(z) [cat] c = Concat<axis = 1>(a, b) [conv] y = Conv(c, w)
            [plain] k = Concat<axis = 1>(x, z)
        }"""
    )
    placement = place(model, Selection())
    assert placement.edges == {"a": (("cat", 0),), "b": (("cat", 1),), "c": (("conv", 0),)}
    assert placement.groups == (("a", "b", "c"),)


def test_a_concatenation_that_is_taken_through_pooling_counts_too_and_one_with_a_constant_does_not(build):
    pooled = build(
        """g (float[N, 4, 8, 8] x) => (float[N, 4, 4, 4] y) <float[4, 8, 1, 1] w> {
            a = Sigmoid(x) [cat] c = Concat<axis = 1>(a, x) p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c) [conv] y = Conv(p, w)
        }"""
    )
    placement = place(pooled, Selection())
    assert placement.edges == {"x": (("cat", 1),), "a": (("cat", 0),), "p": (("conv", 0),)}
    assert placement.groups == (("x", "a", "p"),)
    token = build(
        """g (float[1, 5, 4] x) => (float[1, 6, 4] y) <float[1, 1, 4] token, float[4, 4] w> {
            [cat] c = Concat<axis = 1>(token, x) [m] y = MatMul(c, w)
        }"""
    )
    assert place(token, Selection()).edges == {"c": (("m", 0),)}


def test_concatenations_of_concatenations_share_one_scale(build):
    model = build(
        """g (float[N, 2, 8, 8] x) => (float[N, 2, 8, 8] y) <float[2, 6, 1, 1] w> {
            a = Sigmoid(x) b = Tanh(x) [cat1] c = Concat<axis = 1>(a, b) [cat2] d = Concat<axis = 1>(c, x) [conv] y = Conv(d, w)
        }"""
    )
    assert place(model, Selection()).groups == (("x", "a", "b", "c", "d"),)


PASSING = [
    "MaxPool<kernel_shape = [2, 2]>(r)", "Transpose<perm = [0, 1, 3, 2]>(r)", "Identity(r)", "Slice(r, start, end, axes)",
    "Resize<mode = \"nearest\">(r, , scales)",
]  # fmt: skip
CHANGING = ["Sigmoid(r)", 'Resize<mode = "linear">(r, , scales)', "AveragePool<kernel_shape = [2, 2]>(r)"]


@pytest.mark.parametrize("operator", [*PASSING, *CHANGING])
def test_what_only_moves_numbers_passes_the_scale_through(build, operator):
    model = build(
        f"""g (float[N, 4, 8, 8] x) => (float[] y, float[] z)
        <float[4, 4, 1, 1] w, int64[1] start = {{1}}, int64[1] end = {{4}}, int64[1] axes = {{2}}, float[4] scales = {{1, 1, 2, 2}}> {{
            r = Relu(x) [one] y = Conv(r, w) p = {operator} [two] z = Conv(p, w)
        }}"""
    )
    assert place(model, Selection()).groups == ((("r", "p"),) if operator in PASSING else ())


def test_parts_of_a_tensor_that_is_not_quantized_itself_have_scales_of_their_own(build):
    model = build(
        """g (float[N, 8, 8] x) => (float[N, 4, 4] y) {
            r = Exp(x) q, k = Split<axis = 2, num_outputs = 2>(r) kt = Transpose<perm = [0, 2, 1]>(k) [qk] y = MatMul(kt, q)
        }"""
    )
    placement = place(model, Selection())
    assert placement.edges == {"q": (("qk", 1),), "kt": (("qk", 0),)}
    assert placement.groups == ()
    assert placement.nodes == ("qk",)
    assert placement.weights == {}


def test_pooling_averages_are_quantized(build):
    model = build(
        """g (float[N, 4, 8, 8] x) => (float[N, 4, 1, 1] y) <float[4, 4, 1, 1] w> {
            [c] a = Conv(x, w) r = Relu(a) [avg] p = AveragePool<kernel_shape = [2, 2]>(r) [gap] y = GlobalAveragePool(p)
        }"""
    )
    placement = place(model, Selection())
    assert placement.edges == {"x": (("c", 0),), "r": (("avg", 0),), "p": (("gap", 0),)}
    assert placement.nodes == ("c",)


@pytest.mark.parametrize(
    ("node", "axis"),
    [
        ("Conv(x, w4)", 0),
        ("ConvTranspose(x, w4)", None),
        ("MatMul(x, w2)", 1),
        ("MatMul(x, w4)", None),
    ],
)
def test_weights_have_a_scale_for_each_output_channel_where_tensorrt_takes_it(build, node, axis):
    text = f"g (float[4, 4, 4, 4] x) => (float[] y) <float[4, 4, 4, 4] w4, float[4, 4] w2> {{ [n] y = {node} }}"
    assert place(build(text), Selection()).weights["n"].axis == axis


@pytest.mark.parametrize(("attributes", "axis"), [("", 1), ("<transB = 1>", 0), ("<alpha = 1.0, beta = 1.0, transA = 0>", 1)])
def test_the_output_axis_of_gemm_follows_its_transposition(build, attributes, axis):
    model = build(f"g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w> {{ [n] y = Gemm{attributes}(x, w) }}")
    assert place(model, Selection()).weights == {"n": Weight(initializer="w", axis=axis)}


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("Gemm<alpha = 0.5>(x, w)", "scales its operands"),
        ("Gemm<beta = 0.5>(x, w, b)", "scales its operands"),
        ("Gemm<transA = 1>(x, w)", "transposes its input"),
        ("Gemm(x, v)", "weight is not an FP32 constant"),
        ("MatMul(w, x)", "left operand is a constant"),
        ("MatMul(x, b)", "multiplies by a vector"),
        ("MatMul(w, u)", "input is no FP32 data"),
    ],
)
def test_a_layer_that_cannot_be_quantized_stays_with_the_reason(build, node, reason):
    model = build(
        f"""g (float[4, 4] x) => (float[] y, float[4, 4] z) <float[4, 4] w, float[4, 4] u, float[4] b> {{
            v = Neg(x) [other] y = {node} [fine] z = MatMul(x, w)
        }}"""
    )
    placement = place(model, Selection())
    assert placement.nodes == ("fine",)
    assert placement.edges == {"x": (("fine", 0),)}
    assert reason in reasons(placement)["other"]


def test_arithmetic_on_shapes_and_layers_in_loops_stay_and_those_in_branches_do_not(build):
    model = build(
        """g (float[4, 4] x, bool c, int64 n) => (float[4, 4] y, float[] z, float[4, 4] t, float[4, 4] r)
            <float[4, 4] w, float[2, 2] v> {
            s = Shape(x) f = Cast<to = 1>(s) [shape] z = MatMul(f, v)
            [branch] t = If(c) <then_branch = g1 () => (float[4, 4] p) { [inside] p = MatMul(x, w) },
                                else_branch = g2 () => (float[4, 4] q) { q = Identity(x) }>
            [loop] r = Loop(n, c, x) <body = g3 (int64 i, bool ci, float[4, 4] h) => (bool co, float[4, 4] k)
                                      { co = Identity(ci) [body] k = MatMul(h, w) }>
            [fine] y = MatMul(x, w)
        }"""
    )
    placement = place(model, Selection())
    assert placement.nodes == ("inside", "fine")
    assert reasons(placement) == {"shape": "its input is no FP32 data", "body": "it is in the body of a loop"}


def test_the_first_and_the_last_layers_may_be_in_branches(build):
    branch = "{{ [{0}1] {0}h = MatMul(a, w) [{0}2] {0} = MatMul({0}h, w) }}"
    model = build(
        f"""g (float[4, 4] x, bool c) => (float[4, 4] y) <float[4, 4] w> {{
            a = Relu(x) r = If(c) <then_branch = g1 () => (float[4, 4] p) {branch.format("p")},
                                   else_branch = g2 () => (float[4, 4] q) {branch.format("q")}>
            y = Relu(r)
        }}"""
    )
    assert place(model, Selection(float_first=True)).nodes == ("p2", "q2")
    assert place(model, Selection(float_last=True)).nodes == ("p1", "q1")


@pytest.mark.parametrize(
    ("entry", "left"),
    [("conv1", {"conv1"}), ("Conv", {"stem", "conv1", "conv2"}), ("conv*", {"conv1", "conv2"}), ("add", set())],
)
def test_nodes_are_excluded_by_name_by_operator_or_by_pattern(build, entry, left):
    text = RESIDUAL.replace("y = Relu(f)", "g = Relu(f) m = Flatten<axis = 3>(g) [last] n = MatMul(m, v) y = Identity(g)")
    text = text.replace("float[4] b", "float[4] b, float[8, 8] v")
    placement = place(build(text), Selection(exclude=(entry,)))
    assert set(reasons(placement)) == left
    assert set(reasons(placement).values()) <= {f"excluded by {entry!r}"}
    taken = {node for uses in placement.edges.values() for node, _ in uses}
    assert taken == {"stem", "conv1", "conv2", "last", *([] if entry in ("add", "Conv", "conv*") else ["add"])} - left


def test_an_entry_that_nothing_matches_is_an_error_with_near_names(build):
    with pytest.raises(PrecisionError, match=r"'cnv1' matches no node.*did you mean 'conv1'"):
        place(build(RESIDUAL), Selection(exclude=("cnv1",)))
    with pytest.raises(PrecisionError, match=r"'zzz' matches no node.*expected a node's name"):
        place(build(RESIDUAL), Selection(exclude=("zzz",)))


def test_more_nodes_stay_with_a_reason_of_their_own(build):
    placement = place(build(RESIDUAL), Selection(), stay={"conv1": "too small", "relu2": "whatever"})
    assert reasons(placement) == {"conv1": "too small"}
    with pytest.raises(PrecisionError, match="no node is named 'nope'"):
        place(build(RESIDUAL), Selection(), stay={"nope": "typo"})


@pytest.mark.parametrize(
    ("selection", "left"),
    [(Selection(float_first=True), {"stem"}), (Selection(float_last=True), {"conv2"}), (Selection(), set())],
)
def test_first_and_last_layers_can_stay(build, selection, left):
    placement = place(build(RESIDUAL), selection)
    assert set(reasons(placement)) == left
    assert set(placement.nodes) == {"stem", "conv1", "conv2"} - left


def test_every_input_has_a_first_layer_and_every_output_a_last_one(build):
    model = build(
        """g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y, float[N, 4] k) <float[4, 4] w> {
            [a] p = MatMul(x, w) [b] q = MatMul(z, w) s = Mul(p, q) [mid] t = MatMul(s, w) [c] y = MatMul(t, w) [d] u = MatMul(t, w) k = Tanh(u)
        }"""
    )
    assert set(reasons(place(model, Selection(float_first=True)))) == {"a", "b"}
    assert set(reasons(place(model, Selection(float_last=True)))) == {"c", "d"}


def test_a_quantized_graph_is_refused(build):
    model = build(
        """g (float[N, 4] x) => (float[N, 4] y) <float s = {0.5}, int8 z = {0}, float[4, 4] w> {
            [q] a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) y = MatMul(b, w)
        }"""
    )
    with pytest.raises(PrecisionError, match="quantized already: QuantizeLinear 'q'"):
        place(model, Selection())


def test_a_graph_with_nothing_to_quantize_is_refused(build):
    with pytest.raises(PrecisionError, match="nothing to quantize: the graph has no Conv"):
        place(build("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"), Selection())
    with pytest.raises(PrecisionError, match=r"nothing to quantize.*excluded by 'Conv'"):
        place(build(RESIDUAL), Selection(exclude=("Conv",)))


def test_the_model_is_not_changed(build):
    model = build(RESIDUAL)
    before = model.SerializeToString(deterministic=True)
    place(model, Selection())
    assert isinstance(model, onnx.ModelProto)
    assert model.SerializeToString(deterministic=True) == before
