"""Folding keeps names and numbers."""

import numpy as np
import pytest

from tests.precision.conftest import cpu_graph, fold_batchnorm

PARAMETERS = "float[6] scale, float[6] shift, float[6] mean, float[6] variance = {0.5, 1, 2, 0.25, 3, 1.5}"
WEIGHTS = f"float[6, 4, 3, 3] w, float[4, 6, 3, 3] t, float[4, 3, 3, 3] tg, float[6] b, {PARAMETERS}"
NORM = "BatchNormalization<epsilon = 0.01>"


def operators(model):
    return [node.op_type for node in model.graph.node]


def assert_same_results(model, folded, shape):
    feed = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    expected = cpu_graph(model)(feed)
    for name, value in cpu_graph(folded)(feed).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer", ["Conv(x, w)", "Conv(x, w, b)", "Conv<strides = [2, 2]>(x, w)", "ConvTranspose(x, t, b)", "ConvTranspose<group = 2>(x, tg)"]
)  # fmt: skip
def test_batchnorm_goes_into_the_layer_before_it_which_keeps_its_name(build, layer):
    model = build(
        f"""g (float[2, 4, 8, 8] x) => (float[] y) <{WEIGHTS}> {{
            [layer] a = {layer} [norm] c = {NORM}(a, scale, shift, mean, variance) y = Relu(c)
        }}"""
    )
    folded = fold_batchnorm(model)
    assert operators(folded) == [layer.partition("(")[0].partition("<")[0], "Relu"]
    assert (folded.graph.node[0].name, list(folded.graph.node[0].output)) == ("layer", ["c"])
    assert_same_results(model, folded, (2, 4, 8, 8))


def test_batchnorm_behind_gemm_is_folded_where_it_makes_an_output_too(build):
    model = build(
        f"""g (float[2, 4] x) => (float[2, 6] y) <float[6, 4] w, float[6] b, {PARAMETERS}> {{
            [layer] a = Gemm<transB = 1>(x, w, b) [norm] y = {NORM}(a, scale, shift, mean, variance)
        }}"""
    )
    folded = fold_batchnorm(model)
    assert operators(folded) == ["Gemm"]
    assert folded.graph.node[0].name == "layer"
    assert_same_results(model, folded, (2, 4))


@pytest.mark.parametrize(
    "body",
    [
        f"[layer] a = Conv(x, w) c = {NORM}(a, scale, shift, mean, variance) s = Sigmoid(a) y = Mul(c, s)",
        f"[layer] a = Conv(x, w) r = Relu(a) y = {NORM}(r, scale, shift, mean, variance)",
        f"[layer] a = Conv(x, w) e = Exp(scale) y = {NORM}(a, e, shift, mean, variance)",
    ],
    ids=["output used elsewhere", "activation between", "computed parameter"],
)
def test_batchnorm_that_cannot_be_folded_stays(build, body):
    model = build(f"g (float[2, 4, 8, 8] x) => (float[] y) <float[6, 4, 3, 3] w, {PARAMETERS}> {{ {body} }}")
    folded = fold_batchnorm(model)
    assert operators(folded) == operators(model)
    assert [node.name for node in folded.graph.node] == [node.name for node in model.graph.node]
    assert_same_results(model, folded, (2, 4, 8, 8))


def test_layers_that_share_a_weight_are_folded_right_or_not_at_all(build):
    model = build(
        f"""g (float[2, 4, 8, 8] x) => (float[] y) <float[6, 4, 3, 3] w, {PARAMETERS}, float[6] other> {{
            [one] a = Conv(x, w) [two] b = Conv(x, w)
            c = {NORM}(a, scale, shift, mean, variance) d = {NORM}(b, other, shift, mean, variance) y = Add(c, d)
        }}"""
    )
    folded = fold_batchnorm(model)
    assert {node.name for node in folded.graph.node} >= {"one", "two"}
    assert_same_results(model, folded, (2, 4, 8, 8))


def test_the_argument_is_not_changed(build):
    model = build(
        f"""g (float[2, 4, 8, 8] x) => (float[] y) <float[6, 4, 3, 3] w, {PARAMETERS}> {{
            [layer] a = Conv(x, w) y = {NORM}(a, scale, shift, mean, variance)
        }}"""
    )
    before = model.SerializeToString(deterministic=True)
    fold_batchnorm(model)
    assert model.SerializeToString(deterministic=True) == before
