"""What equalization does to the channels of a pair, on small graphs that ONNX Runtime runs before and after, and on whole
exported architectures."""

import itertools

import numpy as np
import onnx
import pytest
from onnx_ir.passes import PostconditionError

from deploy.precision.int8.equalize import LARGEST
from tests.precision.conftest import equalize, prepare
from tests.precision.int8 import pairs
from tests.precision.int8.pairs import assert_same_results, between, made, mild, normal, taken, two, weights


@pytest.fixture(autouse=True)
def same_weights_whichever_tests_run(monkeypatch):
    monkeypatch.setattr(pairs, "RNG", np.random.default_rng(7))


CHAIN = """g (float[N, 3, 8, 8] x) => (float[N, 5, 8, 8] y) {
    [dense] a = Conv(x, w1, b1) [r1] b = Relu(a)
    [depthwise] c = Conv<group = 16, pads = [1, 1, 1, 1]>(b, w2, b2) [r2] d = Relu(c)
    [last] y = Conv(d, w3, b3) }"""


def chain_weights():
    shapes = {"w1": (16, 3, 1, 1), "w2": (16, 1, 3, 3), "w3": (5, 16, 1, 1), "b1": (16,), "b2": (16,), "b3": (5,)}
    return {name: pairs.RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def rescaled(original):
    """The same function, the channels between the layers scaled by 2^-4 to 2^4."""
    first, second = np.exp2(pairs.RNG.uniform(-4, 4, (2, 16))).astype(np.float32)
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


def test_channels_that_were_rescaled_are_recovered(build_with):
    original = chain_weights()
    spoilt = rescaled(original)
    before = build_with(CHAIN, **spoilt)
    after, names = equalize(before)
    reference = weights(equalize(build_with(CHAIN, **original))[0])
    assert names == ("dense", "depthwise", "last")
    assert_same_results(before, after)
    for name, array in weights(after).items():
        np.testing.assert_allclose(array, reference[name], rtol=0.01)
    assert per_tensor_error(weights(after)["w2"]) < 0.3 * per_tensor_error(spoilt["w2"])


def test_both_ranges_of_every_channel_are_equal_in_the_end(build_with):
    unbiased = chain_weights() | {name: np.zeros(16, np.float32) for name in ("b1", "b2")}
    after = weights(equalize(build_with(CHAIN, **rescaled(unbiased)))[0])
    np.testing.assert_allclose(made(after["w1"]), taken(after["w2"], groups=16), rtol=0.005)
    np.testing.assert_allclose(made(after["w2"]), taken(after["w3"]), rtol=0.005)


def test_an_equalized_graph_is_left_alone(build_with):
    once, _ = equalize(build_with(CHAIN, **rescaled(chain_weights())))
    twice, names = equalize(once)
    assert names == ()
    assert twice.SerializeToString() == once.SerializeToString()


def test_a_chain_of_depthwise_convolutions_is_equalized_from_end_to_end(build_with):
    text = "[d0] a0 = Conv<group = 6>(x, w0)" + "".join(
        f"[r{n}] h{n} = Relu(a{n - 1}) [d{n}] a{n} = Conv<group = 6>(h{n}, w{n})" for n in range(1, 6)
    )
    before = build_with(
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
def test_groups_are_right_on_either_side(build_with, first, second, groups):
    def shape(kind, inputs, made, group):
        return (inputs, made // group, 3, 2) if kind == "ConvTranspose" else (made, inputs // group, 3, 2)

    w1 = normal(*shape(first, 6, 18, groups[0]))
    before = build_with(
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
def test_gemms_are_equalized_whichever_way_their_weights_lie(build_with, transposed, bias):
    w1 = normal(6, 4) if transposed[0] else normal(4, 6)
    before = build_with(
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


def test_channels_without_weights_stay_and_the_others_are_equalized(build_with):
    found = two()
    found["w1"][0] = 0
    found["w2"][:, 1] = 0
    before = build_with(between("[r] k = Relu(h)"), **found)
    after, names = equalize(before)
    assert names == ("c1", "c2")
    assert_same_results(before, after)
    changed = weights(after)
    for channel in (0, 1):
        assert np.array_equal(changed["w1"][channel], found["w1"][channel])
        assert np.array_equal(changed["w2"][:, channel], found["w2"][:, channel])
        assert changed["b1"][channel] == found["b1"][channel]
    np.testing.assert_allclose(made(changed["w1"])[2:], taken(changed["w2"])[2:], rtol=0.005)


def test_a_channel_with_a_weight_that_is_no_number_spoils_no_other(build_with):
    found = two()
    found["w1"][2, 0, 0, 0] = np.nan
    found["w2"][0, 3] = np.inf
    after, _ = equalize(build_with(between("[r] k = Relu(h)"), **found))
    changed = weights(after)
    assert np.isfinite(changed["w1"][[0, 1, 3]]).all()
    assert np.array_equal(changed["w1"][[2, 3]], found["w1"][[2, 3]], equal_nan=True)
    assert np.array_equal(changed["w2"][:, 2:], found["w2"][:, 2:])


@pytest.mark.parametrize("bias", [np.nan, np.inf])
def test_a_bias_that_is_no_number_spoils_no_other(build_with, bias):
    found = two()
    found["b1"][2] = bias
    after, _ = equalize(build_with(between("[r] k = Relu(h)"), **found))
    changed = weights(after)
    assert all(np.isfinite(changed[name]).all() for name in ("w1", "w2"))
    assert np.array_equal(changed["w1"][2], found["w1"][2])
    np.testing.assert_allclose(made(changed["w1"])[[0, 1, 3]], taken(changed["w2"])[[0, 1, 3]], rtol=0.005)


@pytest.mark.parametrize("dead", [1, 12])
def test_the_constant_of_a_dead_channel_is_not_blown_up(build_with, dead):
    """Of 16 channels the first `dead` give their bias and hardly more; the others must keep their share of the activations."""
    found = {
        name: pairs.RNG.standard_normal(shape).astype(np.float32)
        for name, shape in {"w1": (16, 2, 3, 3), "w2": (3, 16, 1, 1)}.items()
    }
    found["b1"] = np.abs(mild(made(found["w1"])))
    found["w1"][:dead] *= 1e-7
    before = build_with(between("[r] k = Relu(h)"), **found)
    after, names = equalize(before)
    assert names == ("c1", "c2")
    assert_same_results(before, after)
    bias = weights(after)["b1"]
    assert bias[:dead].max() < 5 * bias[dead:].max()  # some 1000 times when weights alone are a range


def test_a_scale_has_its_bounds(build_with):
    found = two()
    found["w1"][1] *= 1e-20
    found["b1"][1] = 0
    before = build_with(between("[r] k = Relu(h)"), **found)
    after, _ = equalize(before)
    np.testing.assert_allclose(weights(after)["w1"][1], found["w1"][1] * LARGEST, rtol=1e-6)
    assert_same_results(before, after)


ORDINARY = """g (float[N, 4, 6, 6] x) => (float[N, 6, 6, 6] y) {
    [c1] h = Conv(x, w1, b1) [r1] k = Relu(h) [c2] m = Conv<pads = [1, 1, 1, 1]>(k, w2) [r2] n = MaxPool<kernel_shape = [1, 1]>(m)
    [c3] y = Conv(n, w3) }"""


def ordinary():
    """Three layers whose channels are as a training leaves them, 16 channels between."""
    shapes = {"w1": (16, 4, 1, 1), "b1": (16,), "w2": (16, 16, 3, 3), "w3": (6, 16, 1, 1)}
    return {name: pairs.RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("channels", [[3], [0, 15], [1, 4, 5, 6, 9]])
@pytest.mark.parametrize("times", [30.0, 100.0, 1 / 100])
def test_outliers_are_taken_off_the_pair_that_has_them_and_no_other_layer_is_changed(build_with, channels, times):
    found = ordinary()
    found["w1"][channels] *= times
    found["b1"][channels] *= times
    found["w2"][:, channels] /= times
    before = build_with(ORDINARY, **found)
    after, names = equalize(before, outliers=True)
    assert names == ("c1", "c2")
    assert_same_results(before, after)
    assert np.array_equal(weights(after)["w3"], found["w3"])
    ranges = made(weights(after)["w1"])
    assert ranges.max() / ranges.min() < 3


@pytest.mark.parametrize("times", [200.0, 1e3, 1e4])
def test_an_outlier_of_the_first_layer_alone_is_found_however_large_it_is(build_with, times):
    found = ordinary()
    found["w1"][3] *= times
    found["b1"][3] *= times
    before = build_with(ORDINARY, **found)
    after, names = equalize(before, outliers=True)
    assert names == ("c1", "c2")
    assert_same_results(before, after)


def ordinary_changed(name, channels, factor):
    found = ordinary()
    found[name][channels] *= factor
    return found


@pytest.mark.parametrize(
    "change",
    [
        ("w1", [], 1.0),
        ("w1", [2], 4.0),
        ("w1", [2], 1e-6),  # dead: what reads it is as large as ever
        ("w2", np.s_[:, 3], 1e-6),  # not read
        ("w1", [1, 5], 0.0),
        ("w1", np.s_[:], 1e-3),  # all alike
        ("b1", [4], 1e-4),
    ],
    ids=str,
)
def test_where_no_channel_stands_out_nothing_is_changed(build_with, change):
    found = ordinary_changed(*change)
    after, names = equalize(build_with(ORDINARY, **found), outliers=True)
    assert names == ()
    assert all(np.array_equal(weights(after)[name], array) for name, array in found.items())


def test_pairs_without_any_live_channel_have_no_outliers(build_with):
    found = ordinary()
    found["w1"][:] = 0
    found["w3"][:] = np.nan
    assert equalize(build_with(ORDINARY, **found), outliers=True)[1] == ()


def test_a_graph_of_one_layer_has_nothing_to_equalize(build_with):
    before = build_with("g (float[N, 2, 6, 6] x) => (float[N, 3, 6, 6] y) { y = Conv(x, w) }", w=normal(3, 2, 1, 1))
    assert equalize(before)[1] == ()


def test_an_invalid_graph_is_an_error_of_ours(build_with):
    broken = build_with(between("[r] k = Relu(h)"), **two())
    broken.graph.node[1].op_type = "NoSuchOperator"
    with pytest.raises(PostconditionError, match=r"the pass Equalize must ensure that the graph is valid ONNX: .*NoSuchOperator"):
        equalize(broken)


RESNET_PAIRS = tuple(
    f"layer{stage}.{block}.conv{conv}/Conv" for stage in (1, 2, 3, 4) for block in (0, 1) for conv in (1, 2)
)  # the stem and the ends of the blocks meet in Adds
MOBILENET_CHAIN = ("model.0.0/Conv", *(f"model.{n}.{conv}/Conv" for n in range(1, 14) for conv in (0, 3)), "fc/Gemm")
FEATURES = tuple(f"conv{n}.{conv}/Conv" for n in range(2, 8) for conv in (0, 3))  # each block's result is an output


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("lenet5", ("conv1/Conv", "conv2/Conv", "fc1/Gemm", "fc2/Gemm", "fc3/Gemm")),
        ("mobilenet_v1", MOBILENET_CHAIN),
        ("mobilenet_v1_features", FEATURES),
        ("resnet18", RESNET_PAIRS),
    ],
)
def test_exported_architectures_have_the_pairs_they_should_and_the_same_results(arch, expected, reference):
    before = prepare(onnx.load(reference(arch).onnx_path), opset=19)
    after, names = equalize(before)
    assert names == expected
    assert_same_results(before, after, tolerance=1e-4)
