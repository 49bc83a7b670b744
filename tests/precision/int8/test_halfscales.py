import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploy.precision.codes import FP8, INT8, Codes
from deploy.precision.int8.halfscales import SMALLEST_FP16, subnormal_scales
from deploy.precision.int8.placement import Selection, place
from tests.precision.conftest import prepared


def small(weight: np.ndarray, scale: float = 0.01, codes: Codes = INT8) -> dict[str, str]:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 19]> g (float[N, 2, 4, 4] x) => (float[N, 4, 4, 4] y) { [conv] y = Conv(x, w) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    model = prepared(model, opset=19)
    return subnormal_scales(
        model, place(model, Selection(codes=codes.name, include=("Conv",))), {"x": scale}, codes, per_tensor=False
    )


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 2, 1, 1))


def test_ordinary_scales_are_no_problem(weight):
    assert small(weight) == {}


def test_a_layer_on_a_tiny_activation_stays_out(weight):
    assert "'x'" in small(weight, scale=SMALLEST_FP16 / 2)["conv"]


def test_a_layer_with_tiny_weights_stays_out_and_a_dead_channel_alone_does_not(weight):
    assert "'w'" in small(weight * 1e-6)["conv"]
    weight[0] *= 1e-9
    assert small(weight) == {}


@pytest.mark.parametrize(("below", "left"), [(2, False), (2 * FP8.slack, True)])
def test_a_scale_of_fp8_may_be_rounded_up(weight, below, left):
    assert bool(small(weight, SMALLEST_FP16 / below, FP8)) is left
    smallest = FP8.scale_of(np.median(np.abs(weight).max(axis=(1, 2, 3))))
    assert bool(small(weight * SMALLEST_FP16 / below / smallest, codes=FP8)) is left
