import numpy as np
import onnx_ir as ir
import pytest

from deploy.precision.cpu import CpuGraph
from deploy.precision.half.keep import nodes_to_keep, weight_problem
from deploy.precision.half.options import OPSET
from deploy.precision.ranges import Range, activation_ranges
from tests.precision.conftest import emulate, prepared, to_half


def kept(model, precision="fp16", x=(1, -2)):
    graph = prepared(model, opset=OPSET[precision])
    return nodes_to_keep(graph, activation_ranges(graph, [{"x": np.array(x, dtype=np.float32)}]), precision)


@pytest.mark.parametrize(
    ("weight", "precision", "problem"),
    [
        ([1, -2, 0.1], "fp16", ""),
        ([1, 65504], "fp16", ""),
        ([1, 65519], "fp16", ""),  # rounds to 65504
        ([1, 65520], "fp16", "reaches 6.55e+04; the largest FP16 number is 65504"),
        ([1, -1e6], "fp16", "reaches 1e+06"),
        ([0, -np.inf], "fp16", ""),  # a mask: FP16 has infinities
        ([-3.4028e38], "fp16", "reaches 3.4e+38"),
        ([1e-12], "fp16", "vanishes in FP16 (rounding error 100.0%)"),
        ([1e-6], "fp16", "vanishes in FP16 (rounding error 1.3%)"),
        ([1e-5], "fp16", ""),
        ([1, 1e-12], "fp16", ""),  # next to 1, what vanishes is nothing
        ([0, 0], "fp16", ""),
        ([], "fp16", ""),
        ([1e6, 1e-12], "bf16", ""),
        ([-3.4028e38], "bf16", "the largest BF16 number is 3.3895e+38"),
        ([1e-40], "bf16", "vanishes in BF16"),
    ],
)
def test_weights_that_half_precision_cannot_hold(weight, precision, problem):
    found = weight_problem(np.array(weight, dtype=np.float32), precision)
    assert problem in found
    assert bool(found) == bool(problem)


def test_random_weights_of_any_scale_within_the_normal_range_pass():
    weight = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    for scale in (1e-3, 1, 1e4):
        assert weight_problem(weight * np.float32(scale), "fp16") == ""


def test_a_node_with_a_bad_weight_stays_and_its_neighbours_do_not(parse):
    model = parse("g (float[N] x) => (float[N] y) <float e = {1e-12}> { [r] a = Abs(x) [add] b = Add(a, e) [l] y = Log(b) }")
    assert kept(model) == {"add": "its guard of 1e-12 vanishes in FP16", "l": "its guard of 1e-12 vanishes in FP16"}
    harmless = parse("g (float[N] x) => (float[N] y) <float e = {1e-12}> { [r] a = Abs(x) [mul] b = Mul(a, e) [l] y = Neg(b) }")
    assert kept(harmless)["mul"] == "weight 'e' of at most 1e-12 vanishes in FP16 (rounding error 100.0%)"


def test_all_nodes_around_an_activation_that_overflows_stay(parse):
    model = parse(
        "g (float[N] x) => (float[N] y) <float w = {300}> { [a] a = Mul(x, w) [b] b = Mul(a, w) [c] c = Sqrt(b) [s] s = Shape(b) [d] y = Neg(c) }"
    )
    found = kept(model, x=(1, 2))
    assert set(found) == {"b", "c"}
    assert "output 'b' reaches 1.8e+05; the largest FP16 number is 65504" in found["b"]
    assert "input 'b' reaches" in found["c"]


@pytest.mark.parametrize(("top", "stays"), [(32000, False), (33000, True), (-33000, True)])
def test_activations_may_reach_half_of_the_largest_number(parse, top, stays):
    found = kept(parse("g (float[N] x) => (float[N] y) { [n] y = Neg(x) }"), x=(1, top))
    assert set(found) == ({"n"} if stays else set())


def test_activations_that_vanish_altogether_stay(parse):
    model = parse("g (float[N] x) => (float[N] y) <float w = {0.0001}> { [a] a = Mul(x, w) [b] b = Mul(a, a) [c] y = Sqrt(b) }")
    assert set(kept(model, x=(1, -1))) == {"b", "c"}
    assert kept(model, "bf16", x=(1, -1)) == {}


def test_bf16_has_no_range_problem_where_fp16_has(parse):
    model = parse("g (float[N] x) => (float[N] y) <float w = {1000000}> { [a] y = Mul(x, w) }")
    assert set(kept(model)) == {"a"}
    assert kept(model, "bf16") == {}


def test_infinities_of_a_mask_are_no_overflow(parse):
    model = parse(
        "g (float[N] x) => (float[N] y) <float m = {0}> { z = Greater(x, m) i = Log(m) [w] a = Where(z, x, i) [s] y = Softmax<axis = 0>(a) }"
    )
    assert kept(model) == {}


def test_values_without_a_range_are_taken_as_they_are(parse):
    model = prepared(parse("g (float[N] x) => (float[N] y) { [n] y = Neg(x) }"))
    assert nodes_to_keep(model, {}, "fp16") == {}
    assert set(nodes_to_keep(model, {"x": Range(low=0, high=1e9)}, "fp16")) == {"n"}


@pytest.mark.parametrize(
    ("precision", "largest", "kept"),
    [("bf16", 256, False), ("bf16", 257, True), ("fp16", 2048, False), ("fp16", 2049, True)],
)
def test_whole_numbers_that_half_precision_would_round_stay_until_something_is_made_of_them(parse, precision, largest, kept):
    model = parse(
        """g (int64[N] k, int64[N] n, float[N] x) => (float[N] y)
            { [cast] f = Cast<to = 1>(k) [cast2] h = Cast<to = 1>(n) [sub] a = Sub(f, h) [add] y = Add(a, x) }"""
    )
    graph = prepared(model, opset=OPSET[precision])
    feed = {"k": np.array([3, largest]), "n": np.array([1, largest - 1]), "x": np.array([0.5, largest], np.float32)}
    found = nodes_to_keep(graph, activation_ranges(graph, [feed]), precision)
    assert set(found) - {"cast", "cast2"} == ({"sub"} if kept else set())  # `x` is not whole
    assert all(f"has whole numbers up to {largest}" in reason for reason in found.values())
    converted = to_half(model, precision, keep=found)[0]
    assert CpuGraph(ir.from_proto(emulate(converted)))({**feed, "x": np.zeros(2, np.float32)})["y"].tolist() == [2, 1]
