"""Every rule on small graphs that ONNX Runtime runs before and after, and whole exported architectures."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import deploy
from deploy.errors import PrecisionError
from deploy.precision.graph import prepare
from deploy.precision.int8.equalize import LARGEST, equalize

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def same_weights_whichever_tests_run(monkeypatch):
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(7))


def normal(*shape):
    """Weights whose channels are of very different ranges, along both of the first two axes."""
    spread = [np.exp2(RNG.uniform(-3, 3, (size,) + (1,) * (len(shape) - axis - 1))) for axis, size in enumerate(shape[:2])]
    return (RNG.standard_normal(shape) * np.prod(np.broadcast_arrays(*spread), axis=0)).astype(np.float32)


@pytest.fixture
def build(parse):
    """A prepared graph from text; float arrays become weights, others constants."""

    def build_model(text, **weights):
        model = parse(text)
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
        return prepare(model, opset=19)

    return build_model


def weights(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def outputs(model, feed):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)


def assert_same_results(before, after, tolerance=1e-5):
    feed = {
        value.name: np.random.default_rng(1)
        .standard_normal([dim.dim_value or 3 for dim in value.type.tensor_type.shape.dim])
        .astype(np.float32)
        for value in before.graph.input
    }
    for want, got in zip(outputs(before, feed), outputs(after, feed), strict=True):
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def made(weight, groups=1, transposed=False):
    """Largest magnitude of the weights that make each output channel, one by one, as ONNX defines the operators."""
    if not transposed:
        return np.array([np.abs(kernel).max() for kernel in weight])
    rows, channels = len(weight) // groups, weight.shape[1]
    return np.array([np.abs(weight[g * rows : (g + 1) * rows, c]).max() for g in range(groups) for c in range(channels)])


def taken(weight, groups=1, transposed=False):
    """Largest magnitude of the weights that take each input channel: the two operators are each other's transposes."""
    return made(weight, groups, not transposed)


def mild(ranges):
    """Biases in keeping with the weights, `ranges`, of their channels."""
    return (ranges * RNG.uniform(0.5, 1, len(ranges)) * RNG.choice([-1, 1], len(ranges))).astype(np.float32)


CHAIN = """g (float[N, 3, 8, 8] x) => (float[N, 5, 8, 8] y) {
    [dense] a = Conv(x, w1, b1) [r1] b = Relu(a)
    [depthwise] c = Conv<group = 16, pads = [1, 1, 1, 1]>(b, w2, b2) [r2] d = Relu(c)
    [last] y = Conv(d, w3, b3) }"""


def chain_weights():
    shapes = {"w1": (16, 3, 1, 1), "w2": (16, 1, 3, 3), "w3": (5, 16, 1, 1), "b1": (16,), "b2": (16,), "b3": (5,)}
    return {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def rescaled(original):
    """The same function, the channels between the layers scaled by 2^-4 to 2^4."""
    first, second = np.exp2(RNG.uniform(-4, 4, (2, 16))).astype(np.float32)
    column = (-1, 1, 1, 1)
    return original | {
        "w1": original["w1"] * first.reshape(column),
        "b1": original["b1"] * first,
        "w2": original["w2"] / first.reshape(column) * second.reshape(column),
        "b2": original["b2"] * second,
        "w3": original["w3"] / second.reshape(1, -1, 1, 1),
    }


def per_tensor_error(weight):
    """Mean over output channels of the relative error of 8 bits with one scale for the whole tensor."""
    scale = np.abs(weight).max() / 127
    error = np.abs(weight - np.round(weight / scale) * scale)
    return float((made(error) / made(weight)).mean())


def test_channels_that_were_rescaled_are_recovered(build):
    original = chain_weights()
    spoilt = rescaled(original)
    before = build(CHAIN, **spoilt)
    after, names = equalize(before)
    reference = weights(equalize(build(CHAIN, **original))[0])
    assert names == ("dense", "depthwise", "last")
    assert_same_results(before, after)
    for name, array in weights(after).items():
        np.testing.assert_allclose(array, reference[name], rtol=0.01)
    assert per_tensor_error(weights(after)["w2"]) < 0.3 * per_tensor_error(spoilt["w2"])


def test_both_ranges_of_every_channel_are_equal_in_the_end(build):
    unbiased = chain_weights() | {name: np.zeros(16, np.float32) for name in ("b1", "b2")}
    after = weights(equalize(build(CHAIN, **rescaled(unbiased)))[0])
    np.testing.assert_allclose(made(after["w1"]), taken(after["w2"], groups=16), rtol=0.005)
    np.testing.assert_allclose(made(after["w2"]), taken(after["w3"]), rtol=0.005)


def test_an_equalized_graph_is_left_alone(build):
    once, _ = equalize(build(CHAIN, **rescaled(chain_weights())))
    twice, names = equalize(once)
    assert names == ()
    assert twice.SerializeToString() == once.SerializeToString()


def test_a_chain_of_depthwise_convolutions_is_equalized_from_end_to_end(build):
    text = "[d0] a0 = Conv<group = 6>(x, w0)" + "".join(
        f"[r{n}] h{n} = Relu(a{n - 1}) [d{n}] a{n} = Conv<group = 6>(h{n}, w{n})" for n in range(1, 6)
    )
    before = build(
        f"g (float[N, 6, 5, 5] x) => (float[N, 6, a, b] y) {{ {text} [out] y = Relu(a5) }}",
        **{f"w{n}": np.abs(normal(6, 1, 1, 1)) for n in range(6)},
    )
    after, names = equalize(before)
    assert names == tuple(f"d{n}" for n in range(6))
    assert_same_results(before, after)
    ranges = [made(array) for name, array in weights(after).items() if name.startswith("w")]
    for one, next_one in itertools.pairwise(ranges):
        np.testing.assert_allclose(one, next_one, rtol=0.01)


@pytest.mark.parametrize("second", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("first", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("groups", [(1, 1), (2, 3), (3, 1), (1, 6), (6, 6), (2, 2)])
def test_groups_are_right_on_either_side(build, first, second, groups):
    def shape(kind, inputs, made, group):
        return (inputs, made // group, 3, 2) if kind == "ConvTranspose" else (made, inputs // group, 3, 2)

    w1 = normal(*shape(first, 6, 18, groups[0]))
    before = build(
        f"""g (float[N, 6, 7, 7] x) => (float[N, 12, a, b] y) {{
        [c1] h = {first}<group = {groups[0]}>(x, w1, b1) [r] k = Relu(h) [c2] y = {second}<group = {groups[1]}>(k, w2, b2) }}""",
        w1=w1,
        b1=mild(made(w1, groups[0], first == "ConvTranspose")),
        w2=normal(*shape(second, 18, 12, groups[1])),
        b2=normal(12),
    )
    after, names = equalize(before)
    assert names == ("c1", "c2")
    assert_same_results(before, after)
    found = weights(after)
    np.testing.assert_allclose(
        made(found["w1"], groups[0], first == "ConvTranspose"),
        taken(found["w2"], groups[1], second == "ConvTranspose"),
        rtol=0.005,
    )


@pytest.mark.parametrize("bias", [(6,), (1, 6)])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemms_are_equalized_whichever_way_their_weights_lie(build, transposed, bias):
    w1 = normal(6, 4) if transposed[0] else normal(4, 6)
    before = build(
        f"""g (float[N, 4] x) => (float[N, 3] y) {{
        [g1] h = Gemm<transB = {transposed[0]}, alpha = 0.5, beta = 2.0>(x, w1, b1) [r] k = Relu(h)
        [g2] y = Gemm<transB = {transposed[1]}>(k, w2) }}""",
        w1=w1,
        b1=mild(made(w1, transposed=not transposed[0])).reshape(bias),
        w2=normal(3, 6) if transposed[1] else normal(6, 3),
    )
    after, names = equalize(before)
    assert names == ("g1", "g2")
    assert_same_results(before, after)
    found = weights(after)
    np.testing.assert_allclose(
        made(found["w1"], transposed=not transposed[0]), taken(found["w2"], transposed=not transposed[1]), rtol=0.005
    )


def between(middle, x="float[N, 2, 6, 6] x", y="float[N, 3, a, b] y"):
    """Two convolutions c1 and c2 with `middle` between: from h to k."""
    return f"g ({x}) => ({y}) {{ [c1] h = Conv(x, w1, b1) {middle} [c2] z = Conv(k, w2) [out] y = Relu(z) }}"


def two(**more):
    w1 = normal(4, 2, 3, 3)
    return {"w1": w1, "b1": mild(made(w1)), "w2": normal(3, 4, 1, 1)} | more


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
def test_scales_pass_through_what_commutes_with_them(build, middle):
    slope = np.array([0.5, -2, 1.5, 0], np.float32).reshape(4, 1, 1)
    before = build(between(middle), **two(slope=slope, spatial=np.array([2, 3]), negative=np.array([-1, -2])))
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
def test_nothing_is_scaled_across_what_does_not_commute(build, middle):
    constants = {
        "low": np.float32(0),
        "high": np.float32(6),
        "slope": np.ones((1, 4, 4, 4), np.float32),
        "swapped": np.array([0, 16, 2, 2]),
        "back": np.array([0, 4, 4, 4]),
    }
    before = build(between(middle), **two(**{name: array for name, array in constants.items() if name in middle}))
    after, names = equalize(before)
    assert names == ()
    assert after.SerializeToString() == before.SerializeToString()


def test_a_residual_connection_is_not_scaled(build):
    """Neither the branch that ends in the Add nor the tensor that skips may change, but the pair inside the branch may."""
    before = build(
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
def test_graph_outputs_between_two_layers_stay_what_they_were(build, output):
    before = build(between("[r] k = Relu(h)", y=f"float[N, 3, a, b] y, float[N, 4, a, b] {output}"), **two())
    after, names = equalize(before)
    assert names == ()
    assert after.SerializeToString() == before.SerializeToString()


def test_weights_that_two_nodes_share_are_left_alone(build):
    before = build(
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


def test_a_bias_that_others_use_is_copied_for_the_one_that_changes(build):
    before = build(
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


def test_what_is_no_constant_of_the_layer_alone_keeps_a_pair_apart(build):
    computed = build(
        between("[r] k = Relu(h)", x="float[N, 2, 6, 6] x, float[4] b1"), w1=normal(4, 2, 3, 3), w2=normal(3, 4, 1, 1)
    )
    assert equalize(computed)[1] == ()
    row = build(
        "g (float[5, 4] x) => (float[5, 3] y) { h = Gemm(x, w1, column) k = Relu(h) y = Gemm(k, w2) }",
        w1=normal(4, 5),
        column=normal(5, 1),
        w2=normal(5, 3),
    )
    assert equalize(row)[1] == ()
    turned = build(
        "g (float[5, 4] x) => (float[5, 3] y) { h = Gemm(x, w1) k = Relu(h) y = Gemm<transA = 1>(k, w2) }",
        w1=normal(4, 5),
        w2=normal(5, 3),
    )
    assert equalize(turned)[1] == ()


def test_channels_without_weights_stay_and_the_others_are_equalized(build):
    found = two()
    found["w1"][0] = 0
    found["w2"][:, 1] = 0
    before = build(between("[r] k = Relu(h)"), **found)
    after, names = equalize(before)
    assert names == ("c1", "c2")
    assert_same_results(before, after)
    changed = weights(after)
    for channel in (0, 1):
        assert np.array_equal(changed["w1"][channel], found["w1"][channel])
        assert np.array_equal(changed["w2"][:, channel], found["w2"][:, channel])
        assert changed["b1"][channel] == found["b1"][channel]
    np.testing.assert_allclose(made(changed["w1"])[2:], taken(changed["w2"])[2:], rtol=0.005)


def test_a_channel_with_a_weight_that_is_no_number_spoils_no_other(build):
    found = two()
    found["w1"][2, 0, 0, 0] = np.nan
    found["w2"][0, 3] = np.inf
    after, _ = equalize(build(between("[r] k = Relu(h)"), **found))
    changed = weights(after)
    assert np.isfinite(changed["w1"][[0, 1, 3]]).all()
    assert np.array_equal(changed["w1"][[2, 3]], found["w1"][[2, 3]], equal_nan=True)
    assert np.array_equal(changed["w2"][:, 2:], found["w2"][:, 2:])


@pytest.mark.parametrize("bias", [np.nan, np.inf])
def test_a_bias_that_is_no_number_spoils_no_other(build, bias):
    found = two()
    found["b1"][2] = bias
    after, _ = equalize(build(between("[r] k = Relu(h)"), **found))
    changed = weights(after)
    assert all(np.isfinite(changed[name]).all() for name in ("w1", "w2"))
    assert np.array_equal(changed["w1"][2], found["w1"][2])
    np.testing.assert_allclose(made(changed["w1"])[[0, 1, 3]], taken(changed["w2"])[[0, 1, 3]], rtol=0.005)


@pytest.mark.parametrize("dead", [1, 12])
def test_the_constant_of_a_dead_channel_is_not_blown_up(build, dead):
    """Of 16 channels the first `dead` give their bias and hardly more; the others must keep their share of the activations."""
    found = {
        name: RNG.standard_normal(shape).astype(np.float32) for name, shape in {"w1": (16, 2, 3, 3), "w2": (3, 16, 1, 1)}.items()
    }
    found["b1"] = np.abs(mild(made(found["w1"])))
    found["w1"][:dead] *= 1e-7
    before = build(between("[r] k = Relu(h)"), **found)
    after, names = equalize(before)
    assert names == ("c1", "c2")
    assert_same_results(before, after)
    bias = weights(after)["b1"]
    assert bias[:dead].max() < 5 * bias[dead:].max()  # some 1000 times when weights alone are a range


def test_a_scale_has_its_bounds(build):
    found = two()
    found["w1"][1] *= 1e-20
    found["b1"][1] = 0
    before = build(between("[r] k = Relu(h)"), **found)
    after, _ = equalize(before)
    np.testing.assert_allclose(weights(after)["w1"][1], found["w1"][1] * LARGEST, rtol=1e-6)
    assert_same_results(before, after)


@pytest.mark.parametrize(
    "middle",
    ["k = Flatten(h)", "k = Reshape(h, to_rows)", "u = Relu(h) v = Flatten(u) k = Relu(v)", "k = Reshape(h, by_size)"],
)
def test_a_gemm_behind_a_flattening_takes_a_channel_as_a_block(build, middle):
    before = build(
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
def test_a_gemm_behind_another_reshape_is_no_partner(build, middle):
    width = 48 if "Transpose" in middle else 12
    before = build(
        f"g (float[N, 2, 6, 5] x) => (float[M, 3] y) {{ [c] h = Conv(x, w1, b1) {middle} [g] y = Gemm(k, w2) }}",
        w1=normal(4, 2, 3, 3),
        b1=normal(4),
        w2=normal(width, 3),
        rows_of_a_channel=np.array([-1, 12]),
        rows=np.array([0, -1]),
    )
    assert equalize(before)[1] == ()


def test_a_convolution_behind_a_reshape_is_no_partner(build):
    before = build(
        "g (float[2, 2, 6, 5] x) => (float[1, 3, 2, 1] y) { [c1] h = Conv(x, w1, b1) k = Reshape(h, mixed) [c2] y = Conv(k, w2) }",
        **two(w2=normal(3, 48, 1, 1), mixed=np.array([1, 48, 2, 1])),
    )
    assert equalize(before)[1] == ()


def test_a_reduction_over_the_channels_is_not_crossed(build):
    """Behind it the rows of the image, as many as there were channels, are in the channels' place."""
    before = build(
        """g (float[N, 2, 6, 6] x) => (float[N, 3, 4] y) {
        [c1] h = Conv(x, w1, b1) k = ReduceMean<keepdims = 0>(h, channels) [c2] y = Conv(k, w2) }""",
        **two(w2=normal(3, 4, 1), channels=np.array([1])),
    )
    assert equalize(before)[1] == ()


@pytest.mark.parametrize("middle", ["k = Squeeze(u, spatial)", "k = Flatten(u)"])
def test_pooling_to_one_number_a_channel_needs_no_fixed_image_size(build, middle):
    before = build(
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


def test_a_graph_of_one_layer_has_nothing_to_equalize(build):
    before = build("g (float[N, 2, 6, 6] x) => (float[N, 3, 6, 6] y) { y = Conv(x, w) }", w=normal(3, 2, 1, 1))
    assert equalize(before)[1] == ()


def test_an_invalid_graph_is_an_error(build):
    broken = build(between("[r] k = Relu(h)"), **two())
    broken.graph.node[1].op_type = "NoSuchOperator"
    with pytest.raises(PrecisionError, match="the equalized graph is not valid"):
        equalize(broken)


RESNET_PAIRS = tuple(
    f"layer{stage}.{block}.conv{conv}/Conv" for stage in (1, 2, 3, 4) for block in (0, 1) for conv in (1, 2)
)  # the stem and the ends of the blocks meet in Adds
MOBILENET_CHAIN = ("model.0.0/Conv", *(f"model.{n}.{conv}/Conv" for n in range(1, 14) for conv in (0, 3)), "fc/Gemm")
FEATURES = tuple(f"conv{n}.{conv}/Conv" for n in range(2, 8) for conv in (0, 3))  # each block's result is an output


@pytest.mark.parametrize(
    ("arch", "size", "expected"),
    [
        ("lenet5", None, ("conv1/Conv", "conv2/Conv", "fc1/Gemm", "fc2/Gemm", "fc3/Gemm")),
        ("mobilenet_v1", "1x3x64x64", MOBILENET_CHAIN),
        ("mobilenet_v1_features", "1x3x64x64", FEATURES),
        ("resnet18", "1x3x64x64", RESNET_PAIRS),
    ],
)
def test_exported_architectures_have_the_pairs_they_should_and_the_same_results(arch, size, expected, tmp_path):
    artifact = deploy.export(tmp_path / arch, arch=arch, inputs=[f"input={size}"] if size else [])
    before = prepare(onnx.load(artifact.path / "model.onnx"), opset=19)
    after, names = equalize(before)
    assert names == expected
    assert_same_results(before, after, tolerance=1e-4)
