"""INT8 weights on processors that add products of bytes in 16 bits."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import deploy
from deploy.host.cpu import adds_in_16_bits
from deploy.runtime.backends import openvino as backend
from tests.runtime.backends.codes import LAYERS, bright, exact, halved, quantized


def read(model: onnx.ModelProto, tmp_path: Path) -> "backend.openvino.Model":
    onnx.save(model, tmp_path / "layer.onnx")
    return backend._CORE.read_model(tmp_path / "layer.onnx")


@pytest.mark.parametrize("also", ["", "weight", "codes"])
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_have_half_the_codes_and_twice_the_scale(kind: str, also: str, tmp_path: Path) -> None:
    model = quantized(kind, also=also)
    opened = read(model, tmp_path)
    assert backend.halve_weights(opened) == (2 if also == "codes" else 1)
    assert backend.halve_weights(opened) == 0
    x = bright(kind)
    compiled = backend._CORE.compile_model(opened, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for found, expected in zip(compiled(x).values(), exact(halved(model), x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("change", "kind"), [({"zero": 3}, "Conv"), ({"most": 64}, "Conv"), ({"most": 64}, "MatMul")])
def test_weights_with_a_zero_point_or_small_codes_stay(change: dict[str, int], kind: str, tmp_path: Path) -> None:
    assert backend.halve_weights(read(quantized(kind, **change), tmp_path)) == 0


def test_what_is_between_codes_and_a_layer_may_stay_there(tmp_path: Path) -> None:
    model = quantized("Conv")
    (layer,) = (node for node in model.graph.node if node.op_type == "Conv")
    layer.input[0] = "p"
    model.graph.node.insert(2, onnx.helper.make_node("MaxPool", ["d"], ["p"], kernel_shape=[2, 2]))
    opened, x = read(model, tmp_path), bright("Conv")
    assert backend.halve_weights(opened) == 1
    compiled = backend._CORE.compile_model(opened, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (expected,) = exact(halved(model), x)
    np.testing.assert_allclose(compiled(x)[0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_weights_of_layers_that_read_floats_stay(tmp_path: Path) -> None:
    model = quantized("Conv")
    (layer,) = (node for node in model.graph.node if node.op_type == "Conv")
    layer.input[0] = "x"
    for name in ("QuantizeLinear", "DequantizeLinear"):
        model.graph.node.remove(next(node for node in model.graph.node if node.op_type == name))
    assert backend.halve_weights(read(model, tmp_path)) == 0


def test_constants_of_other_graphs_stay(shared_lenet5: deploy.Artifact) -> None:
    assert backend.halve_weights(backend._CORE.read_model(shared_lenet5.onnx_path)) == 0


@pytest.mark.parametrize("kind", LAYERS)
def test_a_session_is_as_exact_as_its_weights_on_every_processor(kind: str, tmp_path: Path) -> None:
    model, x = quantized(kind), bright(kind)
    onnx.save(model, tmp_path / "layer.onnx")
    (expected,) = exact(halved(model) if adds_in_16_bits() else model, x)
    with deploy.load(tmp_path / "layer.onnx", "openvino") as session:
        (found,) = session.run({"x": x}).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("overflows", "times"), [(True, 2), (False, 1)])
def test_the_processor_decides(overflows: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "adds_in_16_bits", lambda: overflows)
    model = quantized("Gemm")
    onnx.save(model, tmp_path / "layer.onnx")
    with deploy.load(tmp_path / "layer.onnx", "openvino") as session:
        (found,) = session.run({"x": np.full((4, 64), 0.01, np.float32)}).values()  # codes of 1: nothing overflows
    (expected,) = exact(halved(model) if times == 2 else model, np.full((4, 64), 0.01, np.float32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
