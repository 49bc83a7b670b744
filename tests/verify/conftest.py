"""A small network as ONNX files: two convolutions, a residual sum and a matrix, and what is changed in copies of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Change = Callable[[onnx.ModelProto], None]
Write = Callable[..., Path]


def network() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng.standard_normal((8, 3, 3, 3)) * 0.3,
        "w2": rng.standard_normal((8, 8, 3, 3)) * 0.2,
        "w3": rng.standard_normal((8, 5)),
        "b3": rng.standard_normal(5),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="stem/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="stem/Relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="body/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["s"], name="Add"),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="head/Gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def multiply(name: str, factor: float | np.ndarray, place: tuple[int, ...] | slice = slice(None)) -> Change:
    """A change of a weight, or of one element of it."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array[place] = array[place] * factor
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))

    return change


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the network, with changes, as `name`."""

    def to(name: str, *changes: Change) -> Path:
        model = network()
        for change in changes:
            change(model)
        onnx.checker.check_model(model, full_check=True)
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return to
