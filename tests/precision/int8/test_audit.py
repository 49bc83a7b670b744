import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from deploy.precision.codes import INT8
from deploy.precision.int8.audit import Audit
from deploy.precision.int8.histograms import Activations
from deploy.precision.int8.placement import Selection, place
from tests.precision.conftest import prepared

RNG = np.random.default_rng(0)


def build(body: str, shapes: str, **weights: np.ndarray) -> ir.Model:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 19]> g {shapes} {{ {body} }}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return prepared(model, opset=19)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def run_audit(model: ir.Model, feeds: list[dict[str, np.ndarray]], scales: dict[str, float], *, per_tensor: bool = False):
    placement = place(model, Selection())
    activations = Activations(model, list(placement.edges))
    audit = Audit(model, placement, scales, codes=INT8, per_tensor=per_tensor)
    for feed in feeds:
        tensors, _ = activations(feed)
        audit.add(tensors, len(next(iter(feed.values()))))
    return audit.finish()


def quantized(array: np.ndarray, scale: float | np.ndarray) -> np.ndarray:
    return (np.clip(np.rint(array / scale), -128, 127) * scale).astype(np.float32)


def per_channel(weight: np.ndarray, axis: int) -> np.ndarray:
    scale = np.abs(weight).max(axis=tuple(a for a in range(weight.ndim) if a != axis), keepdims=True) / 127
    return quantized(weight, scale)


CONVOLUTIONS = {
    "padded": ("pads = [1, 1, 1, 1]", {"padding": 1}, (6, 4, 3, 3)),
    "strided": ("strides = [2, 2], pads = [1, 1, 1, 1]", {"stride": 2, "padding": 1}, (6, 4, 3, 3)),
    "dilated": ("dilations = [2, 2]", {"dilation": 2}, (6, 4, 3, 3)),
    "depthwise": ("group = 4, pads = [1, 1, 1, 1]", {"groups": 4, "padding": 1}, (4, 1, 3, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_mean_error_of_a_convolution_is_that_of_its_outputs_over_all_rows_and_positions(name: str) -> None:
    attributes, options, shape = CONVOLUTIONS[name]
    weight, bias = normal(*shape), normal(shape[0])
    model = build(f"[conv] y = Conv<{attributes}>(x, w, b)", "(float[N, 4, 9, 9] x) => (float[N, C, H, W] y)", w=weight, b=bias)
    feeds = [{"x": np.abs(normal(rows, 4, 9, 9))} for rows in (3, 1, 2)]
    error = run_audit(model, feeds, {"x": 0.02})["conv"]
    x = np.concatenate([feed["x"] for feed in feeds])

    def conv(data: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        tensors = [torch.from_numpy(array) for array in (data, kernel, bias)]
        return torch.nn.functional.conv2d(*tensors, **options).numpy()

    difference = conv(x, weight) - conv(quantized(x, 0.02), per_channel(weight, 0))
    np.testing.assert_allclose(error.mean, difference.mean(axis=(0, 2, 3)), rtol=1e-3, atol=1e-5)


def test_a_transposed_convolution_and_a_gemm_are_linear_too() -> None:
    weight = normal(4, 3, 2, 2)
    model = build("[up] y = ConvTranspose<strides = [2, 2]>(x, w)", "(float[N, 4, 5, 5] x) => (float[N, C, H, W] y)", w=weight)
    x = normal(6, 4, 5, 5) + 1
    error = run_audit(model, [{"x": x}], {"x": 0.05}, per_tensor=True)["up"]
    stored = quantized(weight, np.abs(weight).max() / 127)
    tensors = [torch.from_numpy(array) for array in (x, weight, quantized(x, 0.05), stored)]
    up = torch.nn.functional.conv_transpose2d
    difference = (up(tensors[0], tensors[1], stride=2) - up(tensors[2], tensors[3], stride=2)).numpy()
    np.testing.assert_allclose(error.mean, difference.mean(axis=(0, 2, 3)), rtol=1e-3, atol=1e-5)

    weight = normal(3, 8)
    model = build("[fc] y = Gemm<transB = 1>(x, w)", "(float[N, 8] x) => (float[N, 3] y)", w=weight)
    x = normal(10, 8) + 1
    error = run_audit(model, [{"x": x}], {"x": 0.05})["fc"]
    difference = x @ weight.T - quantized(x, 0.05) @ per_channel(weight, 0).T
    np.testing.assert_allclose(error.mean, difference.mean(axis=0), rtol=1e-3, atol=1e-5)


def test_the_noise_is_in_decibels_with_and_without_the_mean() -> None:
    weight = normal(3, 8)
    model = build("[fc] y = Gemm<transB = 1>(x, w)", "(float[N, 8] x) => (float[N, 3] y)", w=weight)
    x = np.abs(normal(4, 8)) * 0.04  # most of it is rounded down to 0: a mean error
    error = run_audit(model, [{"x": x}], {"x": 0.1})["fc"]
    exact, rounded = x @ weight.T, quantized(x, 0.1) @ per_channel(weight, 0).T
    difference = exact - rounded
    left = difference - difference.mean(axis=0)

    def decibels(noise: np.ndarray) -> float:
        return 10 * math.log10(np.square(exact).sum() / np.square(noise).sum())

    assert error.sqnr_uncorrected_db == pytest.approx(decibels(difference), abs=0.01)
    assert error.sqnr_db == pytest.approx(decibels(left), abs=0.01)
    assert error.sqnr_db > error.sqnr_uncorrected_db + 1


def test_a_product_of_two_activations_has_noise_and_no_bias() -> None:
    model = build("[p] y = MatMul(a, b)", "(float[N, 3, 8] a, float[N, 8, 3] b) => (float[N, 3, 3] y)")
    a, b = normal(2, 3, 8), normal(2, 8, 3)
    error = run_audit(model, [{"a": a, "b": b}], {"a": 0.05, "b": 0.05})["p"]
    difference = a @ b - quantized(a, 0.05) @ quantized(b, 0.05)
    assert error.mean is None
    assert error.sqnr_db == pytest.approx(10 * math.log10(np.square(a @ b).sum() / np.square(difference).sum()), abs=0.01)


def test_images_of_many_sizes_count_by_their_rows() -> None:
    weight = normal(2, 1, 1, 1)
    model = build("[conv] y = Conv(x, w)", "(float[N, 1, H, W] x) => (float[N, 2, H, W] y)", w=weight)
    feeds = [{"x": np.abs(normal(2, 1, 4, 4))}, {"x": np.abs(normal(1, 1, 6, 2))}]
    error = run_audit(model, feeds, {"x": 0.5})["conv"]
    differences = [
        (weight[None, :, 0] * feed["x"] - per_channel(weight, 0)[None, :, 0] * quantized(feed["x"], 0.5)) for feed in feeds
    ]
    total = sum(d.sum(axis=(0, 2, 3)) for d in differences) / sum(d[:, 0].size for d in differences)
    np.testing.assert_allclose(error.mean, total, rtol=1e-3, atol=1e-5)


def test_names_of_the_users_weights_do_not_matter() -> None:
    """`weight`, `axes` and `exact` are what the probe calls its own."""
    model = build(
        "[conv] y = Conv(x, exact, axes)", "(float[N, 4, 5, 5] x) => (float[N, 2, 3, 3] y)",
        exact=normal(2, 4, 3, 3), axes=normal(2),
    )  # fmt: skip
    assert run_audit(model, [{"x": normal(2, 4, 5, 5)}], {"x": 0.03})["conv"].sqnr_db > 20


def test_residual_sums_pooling_and_joints_are_judged_too() -> None:
    body = """[one] a = Conv(x, w) [sum] s = Add(a, x) [pool] p = GlobalAveragePool(s) t = Tanh(x) [join] j = Concat<axis = 1>(x, t)
        [two] y = Conv(j, v)"""
    outputs = "(float[N, 4, 5, 5] x) => (float[N, 4, 1, 1] p, float[N, 3, 5, 5] y)"
    model = build(body, outputs, w=normal(4, 4, 1, 1), v=normal(3, 8, 1, 1))
    placement = place(model, Selection())
    scales = {"x": 0.03, "s": 0.2, "t": 0.01, "j": 0.05}
    audit = Audit(model, placement, scales, joint={"x": 0.05, "t": 0.05}, codes=INT8, per_tensor=False)
    x = normal(2, 4, 5, 5)
    tensors, _ = Activations(model, list(placement.edges))({"x": x})
    audit.add(tensors, 2)
    errors = audit.finish()
    assert set(errors) == {"one", "two", "sum", "pool", "join"}

    def sqnr(exact: np.ndarray, found: np.ndarray) -> float:
        return float(10 * np.log10(np.square(exact).sum() / np.square(exact - found).sum()))

    s, joined = tensors["s"], np.concatenate([x, np.tanh(x)], axis=1)
    assert errors["sum"].sqnr_db == pytest.approx(sqnr(x, quantized(x, 0.03)), abs=0.01)
    assert errors["pool"].sqnr_db == pytest.approx(sqnr(s.mean((2, 3)), quantized(s, 0.2).mean((2, 3))), abs=0.01)
    assert errors["join"].sqnr_db == pytest.approx(sqnr(joined, quantized(joined, 0.05)), abs=0.01)
    assert all(errors[name].mean is None for name in ("sum", "pool", "join"))
