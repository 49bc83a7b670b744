"""Multiply-accumulates of an ONNX graph, counted by node."""

import math
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import shape_inference

from deploy.errors import PrecisionError

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def count_macs(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Multiply-accumulates of every Conv, ConvTranspose, Gemm and MatMul node at the given input shapes, by node name.

    Conv: elements of the output times kernel size times input channels a group. ConvTranspose: elements of the input
    times kernel size times output channels a group. Gemm and MatMul: elements of the output times the inner dimension.
    Raises PrecisionError when a shape cannot be inferred.
    """
    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        if value.name in shapes:
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
                dim.Clear()
                dim.dim_value = size
    for value in [*model.graph.output, *model.graph.value_info]:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    known: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        known[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    counts: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        if node.op_type not in COUNTED:
            continue
        try:
            counts[node.name or f"{node.op_type}_{index}"] = _macs(node, known)
        except (KeyError, IndexError) as error:
            raise PrecisionError(f"cannot count {node.op_type} {node.name!r} of {path}: no shape for {error}") from error
    return counts


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    first, second = shapes[node.input[0]], shapes[node.input[1]]
    output = math.prod(shapes[node.output[0]])
    if node.op_type == "Conv":  # weight: output channels, input channels a group, kernel
        return output * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weight: input channels, output channels a group, kernel
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return output * first[0 if transposed else 1]
    return output * first[-1]
