"""Which layers are a pair: every rule for the path between them, on small graphs that ONNX Runtime runs before and after."""

import numpy as np
import pytest

from tests.precision.conftest import equalize
from tests.precision.int8 import pairs
from tests.precision.int8.pairs import assert_same_results, between, made, mild, normal, taken, two, weights


@pytest.fixture(autouse=True)
def same_weights_whichever_tests_run(monkeypatch):
    monkeypatch.setattr(pairs, "RNG", np.random.default_rng(7))


@pytest.mark.parametrize(
    "middle",
    [
        "k = Relu(h)",
        "k = LeakyRelu<alpha = 0.3>(h)",
        "k = PRelu(h, slope)",
        "k = MaxPool<kernel_shape = [2, 2], pads = [1, 1, 1, 1]>(h)",
        "k = AveragePool<kernel_shape = [2, 2], pads = [1, 1, 1, 1], count_include_pad = 1>(h)",
        "k = GlobalAveragePool(h)",
        "k = GlobalMaxPool(h)",
        "k = ReduceMean<keepdims = 1>(h, spatial)",
        "k = ReduceMax<keepdims = 1>(h, negative)",
        "k = Dropout(h)",
        "k = Identity(h)",
        "u = Relu(h) v = MaxPool<kernel_shape = [2, 2]>(u) k = Identity(v)",
    ],
)
def test_scales_pass_through_what_commutes_with_them(build_with, middle):
    slope = np.array([0.5, -2, 1.5, 0], np.float32).reshape(4, 1, 1)
    before = build_with(between(middle), **two(slope=slope, spatial=np.array([2, 3]), negative=np.array([-1, -2])))
    after, names = equalize(before)
    assert names == ("c1", "c2")
    assert_same_results(before, after)
    found = weights(after)
    np.testing.assert_allclose(made(found["w1"]), taken(found["w2"]), rtol=0.005)


@pytest.mark.parametrize(
    "middle",
    [
        "k = Clip(h, low, high)",
        "u = Relu(h) k = Clip(u, low, high)",
        "k = Sigmoid(h)",
        "k = HardSwish(h)",
        "k = Elu(h)",
        "k = Softplus(h)",
        "k = Add(h, h)",
        "k = PRelu(slope, h)",
        "u = Relu(h) k = Concat<axis = 0>(u, u)",
        "k = Transpose<perm = [0, 1, 3, 2]>(h)",
        "k = ReduceMean<keepdims = 1>(h)",
        "u = Reshape(h, swapped) v = Relu(u) k = Reshape(v, back)",
        "k = my.Relu(h)",
    ],
)
def test_nothing_is_scaled_across_what_does_not_commute(build_with, middle):
    constants = {
        "low": np.float32(0),
        "high": np.float32(6),
        "slope": np.ones((1, 4, 4, 4), np.float32),
        "swapped": np.array([0, 16, 2, 2]),
        "back": np.array([0, 4, 4, 4]),
    }
    before = build_with(between(middle), **two(**{name: array for name, array in constants.items() if name in middle}))
    after, names = equalize(before)
    assert names == ()
    assert after.SerializeToString() == before.SerializeToString()


def test_a_residual_connection_is_not_scaled(build_with):
    """Neither the branch that ends in the Add nor the tensor that skips may change, but the pair inside the branch may."""
    before = build_with(
        """g (float[N, 2, 6, 6] x) => (float[N, 3, 6, 6] y) {
        [stem] s = Conv(x, w0) [r0] t = Relu(s)
        [inner1] a = Conv(t, w1) [r1] b = Relu(a) [inner2] c = Conv(b, w2)
        [add] d = Add(t, c) [r2] e = Relu(d) [last] y = Conv(e, w3) }""",
        w0=normal(4, 2, 1, 1),
        w1=normal(5, 4, 1, 1),
        w2=normal(4, 5, 1, 1),
        w3=normal(3, 4, 1, 1),
    )
    after, names = equalize(before)
    assert names == ("inner1", "inner2")
    assert_same_results(before, after)


@pytest.mark.parametrize("output", ["h", "k"])
def test_graph_outputs_between_two_layers_stay_what_they_were(build_with, output):
    before = build_with(between("[r] k = Relu(h)", y=f"float[N, 3, a, b] y, float[N, 4, a, b] {output}"), **two())
    after, names = equalize(before)
    assert names == ()
    assert after.SerializeToString() == before.SerializeToString()


def test_weights_that_two_nodes_share_are_left_alone(build_with):
    before = build_with(
        """g (float[N, 2, 6, 6] x) => (float[N, 2, 6, 6] y) {
        [a] h = Conv(x, shared) [r] k = Relu(h) [b] l = Conv(k, shared) [r2] m = Relu(l)
        [c] n = Conv(m, own) [r3] o = Relu(n) [d] y = Conv(o, last) }""",
        shared=normal(2, 2, 1, 1),
        own=normal(2, 2, 1, 1),
        last=normal(2, 2, 1, 1),
    )
    after, names = equalize(before)
    assert names == ("c", "d")
    assert np.array_equal(weights(after)["shared"], weights(before)["shared"])
    assert_same_results(before, after)


def test_a_bias_that_others_use_is_copied_for_the_one_that_changes(build_with):
    before = build_with(
        """g (float[N, 2, 6, 6] x) => (float[N, 2, 6, 6] y, float[N, 2, 6, 6] z) {
        [c1] h = Conv(x, w1, b) [r] k = Relu(h) [c2] y = Conv(k, w2, b) [c3] z = Conv(x, w3, b) }""",
        **{name: normal(2, 2, 1, 1) for name in ("w1", "w2", "w3")},
        b=normal(2),
    )
    after, names = equalize(before)
    assert names == ("c1", "c2")
    assert [list(node.input)[2] for node in after.graph.node if node.op_type == "Conv"] == ["b_equalized", "b", "b"]
    assert np.array_equal(weights(after)["b"], weights(before)["b"])
    assert_same_results(before, after)


def test_what_is_no_constant_of_the_layer_alone_keeps_a_pair_apart(build_with):
    computed = build_with(
        between("[r] k = Relu(h)", x="float[N, 2, 6, 6] x, float[4] b1"), w1=normal(4, 2, 3, 3), w2=normal(3, 4, 1, 1)
    )
    assert equalize(computed)[1] == ()
    row = build_with(
        "g (float[5, 4] x) => (float[5, 3] y) { h = Gemm(x, w1, column) k = Relu(h) y = Gemm(k, w2) }",
        w1=normal(4, 5),
        column=normal(5, 1),
        w2=normal(5, 3),
    )
    assert equalize(row)[1] == ()
    turned = build_with(
        "g (float[5, 4] x) => (float[5, 3] y) { h = Gemm(x, w1) k = Relu(h) y = Gemm<transA = 1>(k, w2) }",
        w1=normal(4, 5),
        w2=normal(5, 3),
    )
    assert equalize(turned)[1] == ()


@pytest.mark.parametrize(
    "middle",
    ["k = Flatten(h)", "k = Reshape(h, to_rows)", "u = Relu(h) v = Flatten(u) k = Relu(v)", "k = Reshape(h, by_size)"],
)
def test_a_gemm_behind_a_flattening_takes_a_channel_as_a_block(build_with, middle):
    before = build_with(
        f"g (float[N, 2, 6, 5] x) => (float[N, 3] y) {{ [c] h = Conv(x, w1, b1) {middle} [g] y = Gemm<transB = 1>(k, w2) }}",
        w1=(w1 := normal(4, 2, 3, 3)),
        b1=mild(made(w1)),
        w2=normal(3, 48),
        to_rows=np.array([0, -1]),
        by_size=np.array([-1, 48]),
    )
    after, names = equalize(before)
    assert names == ("c", "g")
    assert_same_results(before, after)
    found = weights(after)
    np.testing.assert_allclose(made(found["w1"]), taken(found["w2"]).reshape(4, 12).max(axis=1), rtol=0.005)


@pytest.mark.parametrize(
    "middle",
    [
        "k = Reshape(h, rows_of_a_channel)",
        "u = Reshape(h, rows_of_a_channel) k = Flatten(u)",
        "k = Flatten<axis = 2>(h)",
        "u = Transpose<perm = [0, 2, 3, 1]>(h) k = Reshape(u, rows)",
    ],
)
def test_a_gemm_behind_another_reshape_is_no_partner(build_with, middle):
    width = 48 if "Transpose" in middle else 12
    before = build_with(
        f"g (float[N, 2, 6, 5] x) => (float[M, 3] y) {{ [c] h = Conv(x, w1, b1) {middle} [g] y = Gemm(k, w2) }}",
        w1=normal(4, 2, 3, 3),
        b1=normal(4),
        w2=normal(width, 3),
        rows_of_a_channel=np.array([-1, 12]),
        rows=np.array([0, -1]),
    )
    assert equalize(before)[1] == ()


def test_a_convolution_behind_a_reshape_is_no_partner(build_with):
    before = build_with(
        "g (float[2, 2, 6, 5] x) => (float[1, 3, 2, 1] y) { [c1] h = Conv(x, w1, b1) k = Reshape(h, mixed) [c2] y = Conv(k, w2) }",
        **two(w2=normal(3, 48, 1, 1), mixed=np.array([1, 48, 2, 1])),
    )
    assert equalize(before)[1] == ()


def test_a_reduction_over_the_channels_is_not_crossed(build_with):
    """Behind it the rows of the image, as many as there were channels, are in the channels' place."""
    before = build_with(
        """g (float[N, 2, 6, 6] x) => (float[N, 3, 4] y) {
        [c1] h = Conv(x, w1, b1) k = ReduceMean<keepdims = 0>(h, channels) [c2] y = Conv(k, w2) }""",
        **two(w2=normal(3, 4, 1), channels=np.array([1])),
    )
    assert equalize(before)[1] == ()


@pytest.mark.parametrize("middle", ["k = Squeeze(u, spatial)", "k = Flatten(u)"])
def test_pooling_to_one_number_a_channel_needs_no_fixed_image_size(build_with, middle):
    before = build_with(
        f"""g (float[N, 2, H, W] x) => (float[N, 3] y) {{
        [c] h = Conv(x, w1, b1) u = ReduceMean(h, spatial) {middle} [g] y = Gemm(k, w2) }}""",
        w1=normal(4, 2, 3, 3),
        b1=normal(4),
        w2=normal(4, 3),
        spatial=np.array([2, 3]),
    )
    after, names = equalize(before)
    assert names == ("c", "g")
    assert_same_results(before, after)
