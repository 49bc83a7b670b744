"""The share of INT8, and what is too little."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploy.errors import PrecisionError
from deploy.precision.int8.branches import ShareScope
from deploy.precision.int8.placement import Selection, place
from deploy.precision.int8.share import asked_of, layer_macs, quantized_share

NET = """g (float[N, 8] x) => (float[] y) <float[8, 8] u, float[8, 24] v, float[24, 8] w> {
    [small] a = MatMul(x, u) [wide] b = MatMul(a, v) [back] y = MatMul(b, w) }"""
FEED = {"x": np.zeros((3, 8), np.float32)}
NOISY = "its signal is faint"


def share(model: ir.Model, *noisy: str, exclude: tuple[str, ...] = (), least: float = 0.0) -> float | None:
    selection = Selection(exclude=exclude)
    placement = place(model, selection, stay=dict.fromkeys(noisy, NOISY))
    return quantized_share(layer_macs(model, FEED), placement, codes="int8", asked=asked_of(model, selection), least=least)


@pytest.fixture
def model(build: Callable[[str], onnx.ModelProto]) -> ir.Model:
    return ir.from_proto(build(NET))


@pytest.mark.parametrize(("noisy", "expected"), [((), 1.0), (("small",), 6 / 7), (("small", "wide"), 3 / 7)])
def test_it_is_that_of_the_multiply_accumulates(model: ir.Model, noisy: tuple[str, ...], expected: float) -> None:
    assert share(model, *noisy) == pytest.approx(expected)


def test_too_little_is_an_error_that_names_the_layers(model: ir.Model) -> None:
    assert share(model, "small", least=0.85) == pytest.approx(6 / 7)
    with pytest.raises(PrecisionError, match=rf"would be 57% of .* at least 90% .*wide: {NOISY}") as error:
        share(model, "wide", least=0.9)
    assert "`min_share`" in str(error.value)
    assert "back" not in str(error.value)


def test_what_was_asked_for_is_part_of_the_share_and_no_error(model: ir.Model) -> None:
    assert share(model, exclude=("wide",), least=0.9) == pytest.approx(4 / 7)
    with pytest.raises(PrecisionError, match="would be 25% of"):
        share(model, "back", exclude=("wide",), least=0.9)


def test_products_of_activations_and_what_cannot_be_counted_are_left_out(build: Callable[[str], onnx.ModelProto]) -> None:
    model = ir.from_proto(
        build(
            """g (float[N, 8] x) => (float[] y) <float[8, 8] u> {
                [layer] a = MatMul(x, u) t = Transpose<perm = [1, 0]>(a) [product] y = MatMul(a, t) }"""
        )
    )
    assert share(model, "product", least=1.0) == 1.0
    unknown = ir.from_proto(
        build(
            "g (float[N, M] x) => (float[] y) <float[8, 8] u> { k = NonZero(x) f = Cast<to = 1>(k) t = Transpose<perm = [1, 0]>(f) c = Concat<axis = 1>(t, t, t, t) y = MatMul(c, u) }"
        )
    )
    placement = place(unknown, Selection())
    counts = layer_macs(unknown, {"x": np.ones((3, 8), np.float32)})
    assert quantized_share(counts, placement, codes="int8", asked=(), least=0.9) is None


def test_layers_in_branches_count(build: Callable[[str], onnx.ModelProto]) -> None:
    model = ir.from_proto(
        build(
            """g (float[N, 8] x, bool c) => (float[] y) <float[8, 8] u, float[8, 24] v, float[24, 8] w> {
                [small] a = MatMul(x, u)
                y = If(c) <then_branch = g1 () => (float[N, 8] p) { [wide] b = MatMul(a, v) [back] p = MatMul(b, w) },
                           else_branch = g2 () => (float[N, 8] q) { [other] q = MatMul(a, u) }> }"""
        )
    )
    ShareScope()(model)
    assert share(model, "wide") == pytest.approx(5 / 8)
    with pytest.raises(PrecisionError, match=rf"would be 62% of .*: wide: {NOISY}"):
        share(model, "wide", least=0.9)
