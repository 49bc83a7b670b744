"""Codes of 8 bits, their scales, and what is left of a number: as ONNX Runtime has it."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

from deploy.errors import PrecisionError
from deploy.precision.codes import CODES, FP8, INT8, Codes

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_a_scale_is_the_largest_magnitude_by_the_largest_code_and_a_positive_float32(codes: Codes) -> None:
    assert codes.scale_of(codes.largest) == 1
    assert codes.scale_of(0.3) == float(np.float32(0.3 / codes.largest))
    assert codes.scale_of(0.0) == 1
    assert codes.scale_of(1e-45) > 0


@pytest.mark.parametrize(("codes", "largest", "dtype"), [(INT8, 127, np.int8), (FP8, 448, ml_dtypes.float8_e4m3fn)])
def test_each_channel_of_a_weight_has_a_scale_and_no_code_is_off_by_more_than_half_a_step(
    codes: Codes, largest: float, dtype: type
) -> None:
    weight = RNG.normal(size=(3, 4, 50)).astype(np.float32)
    stored, scale = codes.quantize_weight(weight, 1)
    assert (stored.dtype, scale.dtype, stored.shape, scale.shape) == (dtype, np.float32, weight.shape, (4,))
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=(0, 2)) / largest, rtol=1e-6)
    found = stored.astype(np.float32)
    assert (np.abs(found).max(axis=(0, 2)) == largest).all()
    off = np.abs(found - weight / scale[:, None]) / codes.spacing(found)
    assert 0.45 < off.max() < 0.501


def test_without_an_axis_there_is_one_scale() -> None:
    codes, scale = INT8.quantize_weight(np.array([[2.0, -4.0], [1.0, 0.5]]), None)
    assert (scale.shape, float(scale)) == ((), pytest.approx(4 / 127))
    assert codes.tolist() == [[64, -127], [32, 16]]


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_dead_and_tiny_channels_have_scales_that_divide(codes: Codes) -> None:
    weight = np.array([[0.0, 0.0], [1e-44, -1e-44], [1.0, 0.5]], dtype=np.float32)
    stored, scale = codes.quantize_weight(weight, 0)
    assert (scale > 0).all()
    assert (stored[0].astype(np.float32) == 0).all()
    assert np.isfinite(stored.astype(np.float32) * scale[:, None]).all()
    assert codes.quantize_weight(weight, 0, floor=0.01)[1] == pytest.approx([0.01, 0.01, 0.01])
    assert codes.quantize_weight(np.zeros(3), None)[0].astype(np.float32).tolist() == [0, 0, 0]
    with pytest.raises(PrecisionError, match="NaN or infinity"):
        codes.quantize_weight(np.array([[1, np.nan]]), 0)


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_an_activation_is_rounded_as_onnx_runtime_rounds_it(codes: Codes) -> None:
    """Beyond the largest code, between codes, halfway, and down to the smallest ones."""
    halves = np.arange(-600, 600, 0.25, dtype=np.float32) * np.float32(0.5)
    numbers = np.concatenate([halves, np.float32(2.0) ** np.arange(-14, 9), RNG.normal(size=4000) * 100]).astype(np.float32)
    zero = onnx.helper.make_tensor("z", int(codes.dtype), [], np.zeros(1, codes.dtype.numpy()).tobytes(), raw=True)
    scale = onnx.numpy_helper.from_array(np.array(0.5, np.float32), "s")
    nodes = [onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]  # fmt: skip
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in "xy")
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x], [y], [scale, zero]),
        opset_imports=[onnx.helper.make_opsetid("", 19)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(codes.read_back(numbers, 0.5), session.run(None, {"x": numbers})[0])


def test_a_scale_of_fp8_may_be_too_large_by_its_slack() -> None:
    weight = RNG.normal(size=(64, 64)).astype(np.float32)
    noise = []
    for factor in (1.0, FP8.slack):
        scale = FP8.scale_of(np.abs(weight).max()) * factor
        noise.append(np.square(FP8.read_back(weight, scale) - weight).sum())
    assert noise[1] < 1.1 * noise[0]
