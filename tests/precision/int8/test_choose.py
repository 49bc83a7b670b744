"""Ranges by their error at the output of the layers that read them."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploy.calibration.histogram import Histogram
from deploy.calibration.thresholds import METHODS, Method, threshold
from deploy.precision.codes import INT8
from deploy.precision.int8.choose import BETTER, best_ranges
from deploy.precision.int8.placement import Selection, place

CONV = "g (float[N, 2, 8, 8] x) => (float[N, 3, 8, 8] y) { [n] y = Conv(x, w) }"
GEMM = "g (float[N, 2] x) => (float[N, 3] y) { [n] y = Gemm(x, w, b) }"
MATMUL = "g (float[N, 5, 2] x) => (float[N, 5, 3] y) { [n] y = MatMul(x, w) }"


def chosen(model: onnx.ModelProto, *samples: dict[str, np.ndarray]) -> tuple[dict[str, float], dict[str, Histogram]]:
    graph = ir.from_proto(model)
    placement = place(graph, Selection())
    histograms = {tensor: Histogram() for tensor in placement.edges}
    for sample in samples:
        for tensor, histogram in histograms.items():
            histogram.add(sample[tensor])
    return best_ranges(graph, placement, histograms, samples, INT8), histograms


def outliers(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Normal numbers, with three of 40 in the second channel."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for row in (3, 30, 300):
        values[tuple({0: row, axis: 1}.get(place, 0) for place in range(values.ndim))] = 40
    return values


@pytest.mark.parametrize(
    ("text", "shape", "axis", "weight"),
    [(CONV, (320, 2, 8, 8), 1, (3, 2, 1, 1)), (GEMM, (20_000, 2), 1, (2, 3)), (MATMUL, (4_000, 5, 2), 2, (2, 3))],
)
def test_outliers_are_kept_if_the_layer_reads_them_and_clipped_if_not(build_with, text, shape, axis, weight) -> None:
    x = outliers(shape, axis)
    ranges = []
    for factor in (1.0, 1e-4):  # of the channel with the outliers
        w = np.ones(weight, np.float32)
        np.moveaxis(w, 1 if weight == (3, 2, 1, 1) else 0, 0)[1] *= factor
        model = build_with(text, w=w, **({"b": np.zeros(3, np.float32)} if "b)" in text else {}))
        found, _ = chosen(model, {"x": x})
        ranges.append(found["x"])
    assert ranges[0] > 0.9 * np.abs(x).max()
    assert ranges[1] < 0.6 * np.abs(x).max()


@pytest.mark.parametrize(
    ("text", "shape", "einsum", "usual"),
    [
        (CONV, (200, 2, 8, 8), "oc,nchw->nohw", "percentile"),
        (GEMM, (12_800, 2), "oc,nc->no", "percentile"),
        (MATMUL, (2_560, 5, 2), "oc,ntc->nto", "entropy"),
    ],
)
@pytest.mark.parametrize("tail", [1.5, 1.8, 2.5, 3.0, 3.5, 5.0, 30.0])
def test_the_usual_range_stands_unless_another_is_clearly_better(
    build_with, text: str, shape: tuple[int, ...], einsum: str, usual: Method, tail: float
) -> None:
    x = np.random.default_rng(3).standard_t(tail, shape).astype(np.float32)
    w = np.random.default_rng(4).standard_normal((3, 2)).astype(np.float32)
    given = {"w": w[..., None, None] if text == CONV else w.T, **({"b": np.zeros(3, np.float32)} if text == GEMM else {})}
    found, histograms = chosen(build_with(text, **given), {"x": x})

    def error(amax: float) -> float:
        scale = INT8.scale_of(amax)
        off = x - np.clip(np.rint(x / scale), -128, 127) * scale
        return float(np.square(np.einsum(einsum, w, off)).sum())

    tried: dict[Method, float] = {method: error(threshold(histograms["x"], method)) for method in METHODS}
    if tried[usual] <= BETTER * min(tried.values()):
        assert found["x"] == threshold(histograms["x"], usual)
    else:
        assert error(found["x"]) <= 1.01 * min(tried.values())
        assert error(found["x"]) < tried[usual] / BETTER


def test_it_depends_neither_on_how_rows_are_divided_nor_on_their_order(build: Callable[[str], onnx.ModelProto]) -> None:
    model = build(
        """g (float[N, 2, 8, 8] x) => (float[] y) <float[2, 2, 3, 3] u, float[2, 2, 3, 3] v> {
            a = Conv(x, u) [r] c = Relu(a) d = Conv(c, v) p = GlobalAveragePool(d) y = Flatten(p) }"""
    )
    rng = np.random.default_rng(0)
    rows = [{name: rng.standard_t(3, (1, 2, size, size)).astype(np.float32) for name, size in (("x", 8), ("c", 6), ("d", 4))} for _ in range(4)]  # fmt: skip
    whole = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    assert chosen(model, *rows)[0] == chosen(model, whole)[0] == chosen(model, *reversed(rows))[0]


@pytest.mark.parametrize("x", [np.zeros((4, 2), np.float32), np.full((4, 2), 0.5, np.float32)])
def test_constant_data_has_its_own_magnitude(build_with, x: np.ndarray) -> None:
    found, _ = chosen(build_with(GEMM, w=np.ones((2, 3)).astype(np.float32), b=np.zeros(3, np.float32)), {"x": x})
    assert found["x"] == pytest.approx(np.abs(x).max())


def test_both_operands_of_a_product_are_chosen(build: Callable[[str], onnx.ModelProto]) -> None:
    model = build("g (float[N, 4, 6] x, float[N, 6, 4] z) => (float[] y) { [n] y = MatMul(x, z) }")
    rng = np.random.default_rng(0)
    sample = {"x": rng.standard_normal((3, 4, 6)).astype(np.float32), "z": 5 * rng.standard_normal((3, 6, 4)).astype(np.float32)}
    found, _ = chosen(model, sample)
    for name, amax in found.items():
        assert 0.3 * np.abs(sample[name]).max() < amax <= np.abs(sample[name]).max(), name
