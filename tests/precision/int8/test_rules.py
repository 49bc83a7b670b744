"""Which products stay in floating point by rule, and that `include` overrules it."""

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest

from deploy.errors import PrecisionError
from deploy.precision.int8.placement import Selection, place
from deploy.precision.int8.rules import RULES, rule_for

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
