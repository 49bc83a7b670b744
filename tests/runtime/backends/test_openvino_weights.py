"""INT8 weights on processors that add products of bytes in 16 bits."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import deploy
from deploy.host.cpu import adds_in_16_bits
from deploy.runtime.backends import openvino as backend

RNG = np.random.default_rng(0)
LAYERS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], dict[str, int]]] = {
    "Conv": ((16, 8, 3, 3), 0, (4, 8, 6, 6), {}),
    "Conv, grouped": ((8, 1, 3, 3), 0, (4, 8, 6, 6), {"group": 8}),
    "ConvTranspose": ((8, 16, 2, 2), 1, (4, 8, 6, 6), {}),
    "Gemm": ((64, 16), 1, (4, 64), {}),
    "Gemm, transposed": ((16, 64), 0, (4, 64), {"transB": 1}),
    "MatMul": ((64, 16), 1, (4, 5, 64), {}),
}
"""By name: the shape of the weight, the axis of its channels, the shape of the input, and attributes."""


def quantized(kind: str, zero: int = 0, *, also: str = "", most: int = 127) -> onnx.ModelProto:
    """A layer on codes, without a bias. zero: the zero point of the weight. also: of another layer that reads the same weight, either the same
    conversion (`weight`) or the same codes and scale (`codes`)."""
    shape, axis, fed, attributes = LAYERS[kind]
    codes = RNG.integers(-most, most + 1, shape).astype(np.int8)
    codes.reshape(-1)[0] = most
    scale = RNG.uniform(0.5, 2, shape[axis]).astype(np.float32) / most
    arrays = {
        "w": codes,
        "s": scale,
        "z": np.full(scale.shape, zero, np.int8),
        "xs": np.array(0.01, np.float32),
        "xz": np.array(0, np.uint8),
    }
    layer = kind.partition(",")[0]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], axis=axis),
        helper.make_node(layer, ["d", "wd"], ["y"], **attributes),
    ]
    if also == "codes":
        nodes.append(helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd2"], axis=axis))
    if also:
        nodes.append(helper.make_node(layer, ["d", "wd2" if also == "codes" else "wd"], ["y2"], **attributes))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (["y", "y2"] if also else ["y"])]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(fed))],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with half the codes and twice the scale."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(np.rint(array / 2).astype(np.int8), "w"))
        if tensor.name == "s":
            tensor.CopyFrom(numpy_helper.from_array(array * np.float32(2), "s"))
    return made


def exact(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """The outputs, computed in floating point as the file says."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def read(model: onnx.ModelProto, tmp_path: Path) -> "backend.openvino.Model":
    onnx.save(model, tmp_path / "layer.onnx")
    return backend._CORE.read_model(tmp_path / "layer.onnx")


def bright(kind: str) -> np.ndarray:
    """An input whose codes are large, so that sums of two products would not fit into 16 bits."""
    return RNG.uniform(1.5, 2.55, LAYERS[kind][2]).astype(np.float32)


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
