"""Multiply-accumulates of an ONNX graph, counted by node."""

import math
from collections.abc import Mapping

import onnx
import onnx_ir as ir
from onnx import shape_inference
from onnxscript.optimizer import fold_constants

from deploy.errors import PrecisionError
from deploy.precision.graph import slim_proto

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def count_macs(model: ir.Model, shapes: Mapping[str, tuple[int, ...]], *, shown: object = "the model") -> dict[str, int]:
    """Multiply-accumulates of every Conv, ConvTranspose, Gemm and MatMul node at the given input shapes, by node name.

    Conv: elements of the output times kernel size times input channels of a group. ConvTranspose: elements of the input
    times kernel size times output channels of a group. Gemm and MatMul: elements of the output times the inner dimension.
    `shown`: what to call the model in an error. Raises PrecisionError when a shape cannot be inferred.
    """
    fixed = model.clone()
    for value in fixed.graph.inputs:
        if value.name is not None and value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])
    for node in fixed.graph.all_nodes():
        for value in node.outputs:
            value.shape = None
    try:
        return _counts(shape_inference.infer_shapes(slim_proto(fixed), data_prop=True).graph)
    except LookupError:
        pass  # shapes that the graph computes, as for im2col: they are constants once the input shapes are
    fold_constants(fixed)
    try:
        return _counts(shape_inference.infer_shapes(slim_proto(fixed), data_prop=True).graph)
    except LookupError as error:
        raise PrecisionError(f"cannot count the multiply-accumulates of {shown}: {error.args[0]}") from error


def _counts(graph: onnx.GraphProto) -> dict[str, int]:
    """The multiply-accumulates by node. Raises LookupError for a node whose shapes are not known."""
    known: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            known[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    counts: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        if node.op_type in COUNTED:
            unknown = [name for name in (*node.input[:2], node.output[0]) if name not in known]
            if unknown:
                raise LookupError(f"no shape for {unknown[0]!r} of {node.op_type} {node.name!r}")
            counts[node.name or f"{node.op_type}_{index}"] = _macs(node, known)
    return counts


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    first, second = shapes[node.input[0]], shapes[node.input[1]]
    output = math.prod(shapes[node.output[0]])
    if node.op_type == "Conv":  # weight: output channels, input channels of a group, kernel
        return output * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weight: input channels, output channels of a group, kernel
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return output * first[0 if transposed else 1]
    return output * first[-1]
