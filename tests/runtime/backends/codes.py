"""Layers on codes whose products do not fit into 16 bits."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

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


def signed(kind: str) -> onnx.ModelProto:
    """As `quantized`, with signed activations behind a Relu."""
    model = quantized(kind)
    set_array(model, "xz", np.array(0, np.int8))
    model.graph.node[0].input[0] = "r"
    model.graph.node.insert(0, helper.make_node("Relu", ["x"], ["r"]))
    return model


def set_array(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    """Give the initializer `name` other numbers."""
    next(each for each in model.graph.initializer if each.name == name).CopyFrom(numpy_helper.from_array(array, name))


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


def exact(model: onnx.ModelProto, x: np.ndarray, name: str = "x") -> list[np.ndarray]:
    """The outputs, computed in floating point as the file says."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: x}))


def bright(kind: str) -> np.ndarray:
    """An input whose codes are large, so that sums of two products would not fit into 16 bits."""
    return RNG.uniform(1.5, 2.55, LAYERS[kind][2]).astype(np.float32)


def chained(shared: bool) -> tuple[onnx.ModelProto, np.ndarray]:
    """Three convolutions with codes between them, and an input; `shared`: their weights share the zero point."""
    shapes = [(16, 8, 1, 1), (16, 16, 1, 1), (16, 16, 1, 1)]
    arrays: dict[str, np.ndarray] = {
        "zero": np.array(0, np.uint8),
        "step": np.array(0.01, np.float32),
        "z": np.zeros(16, np.int8),
    }
    nodes = []
    for place, shape in enumerate(shapes):
        zero = "z" if shared else f"z{place}"
        arrays |= {
            f"w{place}": RNG.integers(20, 128, shape).astype(np.int8),
            f"s{place}": np.full(16, 2.0 / shape[1] / 127, np.float32),
            zero: np.zeros(16, np.int8),
        }
        nodes += [
            helper.make_node("QuantizeLinear", [f"x{place}", "step", "zero"], [f"q{place}"]),
            helper.make_node("DequantizeLinear", [f"q{place}", "step", "zero"], [f"d{place}"]),
            helper.make_node("DequantizeLinear", [f"w{place}", f"s{place}", zero], [f"f{place}"], axis=0),
            helper.make_node("Conv", [f"d{place}", f"f{place}"], [f"x{place + 1}"]),
        ]
    used = {name: array for name, array in arrays.items() if any(name in node.input for node in nodes)}
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [2, 8, 6, 6])],
        [helper.make_tensor_value_info("x3", TensorProto.FLOAT, [2, 16, 6, 6])],
        [numpy_helper.from_array(array, name) for name, array in used.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model, RNG.uniform(0, 2.0, (2, 8, 6, 6)).astype(np.float32)
