"""Which products stay in floating point by rule, and that `include` overrules it."""

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest

from deploy.artifact.onnxshapes import with_sizes
from deploy.errors import PrecisionError
from deploy.precision.int8.placement import Selection, place
from deploy.precision.int8.rules import RULES, engine_rule_for, rule_for

HEAD = """g (float[2, 5, 4] x, float[2, 5, 5] m, bool[2, 5, 5] c) => (float[] y) <float[4, 4] q, float[4, 4] k, float d, float[4, 4] o> {
    [query] a = MatMul(x, q) [key] b = MatMul(x, k) t = Transpose<perm = [0, 2, 1]>(b) """
ATTENTION = {
    "plain": "[scores] s = MatMul(a, t) p = Softmax(s) [values] v = MatMul(p, x) [out] y = MatMul(v, o) }",
    "scaled and masked": "[scores] s = MatMul(a, t) e = Div(s, d) f = Add(e, m) p = Softmax(f) [values] v = MatMul(p, x) [out] y = MatMul(v, o) }",
    "where": "[scores] s = MatMul(a, t) e = Where(c, s, m) p = Softmax(e) n = Where(c, m, p) [values] v = MatMul(n, x) [out] y = MatMul(v, o) }",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_both_products_of_attention_stay_in_floating_point(name: str, build: Callable[[str], onnx.ModelProto]) -> None:
    placement = place(ir.from_proto(build(HEAD + ATTENTION[name])), Selection())
    assert placement.nodes == ("query", "key", "out")
    assert {each.node for each in placement.excluded} == {"scores", "values"}
    assert all("attention" in each.reason for each in placement.excluded)


@pytest.mark.parametrize(("include", "quantized"), [("values", {"values"}), ("MatMul", {"scores", "values"})])
def test_what_is_included_is_quantized(include: str, quantized: set[str], build: Callable[[str], onnx.ModelProto]) -> None:
    placement = place(ir.from_proto(build(HEAD + ATTENTION["plain"])), Selection(include=(include,)))
    assert set(placement.nodes) == {"query", "key", "out"} | quantized


def test_an_inclusion_that_matches_nothing_is_an_error(build: Callable[[str], onnx.ModelProto]) -> None:
    with pytest.raises(PrecisionError, match="the inclusion 'valeus' matches no node of the graph; did you mean 'values'"):
        place(ir.from_proto(build(HEAD + ATTENTION["plain"])), Selection(include=("valeus",)))


@pytest.mark.parametrize(
    "body",
    [
        "t = Transpose<perm = [0, 2, 1]>(x) [n] s = MatMul(x, t) y = Relu(s) }",
        "[n] s = MatMul(x, w) y = Softmax(s) }",  # of a weight: a classifier
        "p = Softmax(x) [n] y = MatMul(p, w) }",
    ],
)
def test_other_products_are_quantized(body: str, build: Callable[[str], onnx.ModelProto]) -> None:
    model = ir.from_proto(build(f"g (float[2, 5, 4] x) => (float[] y) <float[4, 6] w> {{ {body}"))
    assert place(model, Selection()).nodes == ("n",)
    assert all(rule_for(node, "int8") is None for node in model.graph)


def test_every_rule_says_why_and_who_says_so() -> None:
    assert all(rule.reason and rule.source for rule in RULES)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("[n] y = MatMul(x, w)", None),
        ("[n] y = Gemm<transB = 1>(flat, w)", None),
        ("t = Transpose<perm = [0, 2, 1]>(x) [n] y = MatMul(x, t)", "FP8 is for Gemm and MatMul with weights"),
        ("[n] y = Conv(x, k)", "FP8 is for Gemm and MatMul with weights"),
        ("[n] y = ConvTranspose(x, k)", "FP8 is for Gemm and MatMul with weights"),
        ("[n] y = GlobalAveragePool(x)", "FP8 is for Gemm and MatMul with weights"),
    ],
)
def test_fp8_is_for_products_with_weights(body: str, left: str | None, build: Callable[[str], onnx.ModelProto]) -> None:
    text = f"g (float[2, 5, 4] x, float[2, 4] flat) => (float[] y) <float[4, 4] w, float[5, 5, 1] k> {{ {body} }}"
    node = next(node for node in ir.from_proto(build(text)).graph if node.name == "n")
    rule = rule_for(node, "fp8")
    assert (rule.reason if rule else None) == left
    assert rule_for(node, "int8") is None


VECTOR, SMALL, FEW = "it multiplies by one vector", "fewer than 16 numbers", "too few channels"


@pytest.mark.parametrize(
    ("inputs", "weight", "node", "left"),
    [
        ("8, 32", "32, 64", "MatMul(x, w)", None),
        ("1, 32", "32, 64", "MatMul(x, w)", VECTOR),
        ("1, 32", "64, 32", "Gemm<transB = 1>(x, w)", VECTOR),
        ("8, 32", "32, 1", "MatMul(x, w)", VECTOR),
        ("1, 1, 32", "32, 64", "MatMul(x, w)", None),  # as NVIDIA's quantizer has it: a stack may have many rows
        ("8, 32", "32, 15", "MatMul(x, w)", SMALL),
        ("8, 15", "15, 32", "MatMul(x, w)", SMALL),
        ("8, 15", "32, 15", "Gemm<transB = 1>(x, w)", SMALL),
        ("8, 16", "16, 16", "Gemm(x, w)", None),
        ("2, 3, 32, 32", "64, 3, 7, 7", "Conv(x, w)", None),
        ("2, 1, 32, 32", "6, 1, 5, 5", "Conv(x, w)", FEW),
        ("2, 6, 32, 32", "16, 6, 5, 5", "Conv(x, w)", None),
        ("2, 6, 32, 32", "16, 6, 3, 5", "Conv(x, w)", FEW),
        ("2, 6, 32, 32", "20, 6, 3, 3", "Conv(x, w)", FEW),
        ("2, 32, 32, 32", "32, 1, 3, 3", "Conv<group = 32>(x, w)", None),
        ("2, 32, 32, 32", "32, 1, 1, 1", "Conv<group = 32>(x, w)", FEW),
        ("2, 30, 32, 32", "30, 1, 3, 3", "Conv<group = 30>(x, w)", FEW),
        ("2, 16, 32, 32", "16, 16, 3, 5", "Conv(x, w)", None),
    ],
)
def test_what_is_slow_in_an_engine_stays_in_floating_point_there(
    inputs: str, weight: str, node: str, left: str | None, build: Callable[[str], onnx.ModelProto]
) -> None:
    model = with_sizes(ir.from_proto(build(f"g (float[{inputs}] x) => (float[] y) <float[{weight}] w> {{ [n] y = {node} }}")), {})
    (layer,) = model.graph
    sizes = {"x": tuple(map(int, inputs.split(","))), "y": tuple(layer.outputs[0].shape.numpy())}
    rule = engine_rule_for(layer, "int8", sizes)
    assert (left in rule.reason) if rule and left else rule is left
    assert rule_for(layer, "int8") is None


def test_a_convolution_of_few_channels_that_are_multiples_of_8_is_quantized_at_the_input_alone(
    build: Callable[[str], onnx.ModelProto],
) -> None:
    model = ir.from_proto(
        build(
            "g (float[2, 8, 9, 9] x) => (float[] y) <float[8, 8, 3, 3] v, float[8, 8, 3, 3] w> { h = Conv(x, v) y = Conv(h, w) }"
        )
    )
    assert [engine_rule_for(node, "int8", {}) is not None for node in model.graph] == [False, True]
