"""Which operand of a sum is quantized beside the layer that makes the other."""

import pytest

from deploy.precision.int8.placement import Selection
from tests.precision.conftest import place

RESIDUAL = """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) <float[4, 4, 1, 1] w1, float[4, 4, 1, 1] w2, float[4] b> {
    [stem] a = Conv(x, w1) [relu0] s = Relu(a)
    [conv1] c = Conv(s, w1) [relu1] d = Relu(c)
    [conv2] e = Conv(d, w2, b) [add] f = Add(e, s) [relu2] y = Relu(f)
}"""


def test_the_skip_input_of_a_residual_sum_is_quantized_and_not_the_one_that_a_layer_makes(build):
    placement = place(build(RESIDUAL), Selection())
    assert placement.edges == {"x": (("stem", 0),), "s": (("conv1", 0), ("add", 1)), "d": (("conv2", 0),)}


def test_of_two_layers_that_make_a_sum_the_later_one_takes_it_in(build):
    model = build(
        """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) <float[4, 4, 1, 1] w, float[4, 4, 1, 1] v> {
            [main] a = Conv(x, w) [short] b = Conv(x, v) [add] c = Add(b, a) y = Relu(c)
        }"""
    )
    assert place(model, Selection()).edges == {"x": (("main", 0), ("short", 0)), "a": (("add", 1),)}


@pytest.mark.parametrize(
    ("body", "edges"),
    [
        ("[m] a = Conv(x, w) [bias] c = Add(a, b) [add] y = Add(x, c)", {"x": (("m", 0), ("add", 0))}),
        ("[m] a = Conv(x, w) [bias] y = Add(a, b)", {"x": (("m", 0),)}),
        ("[m] a = Conv(x, w) c = Sigmoid(a) y = Add(x, c)", {"x": (("m", 0),)}),
        ("[m] a = Conv(x, w) c = Add(x, a) y = Mul(c, a)", {"x": (("m", 0),)}),
        ("[m] a = Conv(x, w) s = ReduceMax(x, axes) y = Add(s, a)", {"x": (("m", 0),)}),
    ],
    ids=["behind a bias", "the bias itself", "behind an activation", "a layer used twice", "broadcast"],
)
def test_a_sum_is_residual_when_it_can_run_inside_the_layer(build, body, edges):
    text = "g (float[N, 4, 5, 5] x) => (float[N, 4, 5, 5] y) <float[4, 4, 1, 1] w, float[4, 1, 1] b, int64[2] axes = {2, 3}> {"
    assert place(build(f"{text} {body} }}"), Selection()).edges == edges


@pytest.mark.parametrize("layer", ["MatMul(x, w)", "Gemm(x, w)"])
def test_the_residual_stream_of_a_transformer_stays_in_floating_point(build, layer):
    text = f"g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w, float[4] b> {{ [m] a = {layer} c = Add(a, b) [add] y = Add(x, c) }}"
    assert place(build(text), Selection()).edges == {"x": (("m", 0),)}


def test_no_sum_is_quantized_in_fp8(build):
    placement = place(build(RESIDUAL), Selection(codes="fp8", include=("Conv",)))
    assert placement.edges == {"x": (("stem", 0),), "s": (("conv1", 0),), "d": (("conv2", 0),)}
