"""Multiply-accumulates of an ONNX graph, counted by node."""

import logging
import math
from collections.abc import Mapping

import onnx
import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from deploy.artifact.onnxshapes import infer_shapes, slim_proto, with_sizes
from deploy.precision.graph import first_line, inner_nodes
from deploy.precision.int8.branches import branched_nodes, branches

logger = logging.getLogger(__name__)

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_UNCOUNTED = (
    "Attention",
    "ConvInteger",
    "DeformConv",
    "Einsum",
    "GRU",
    "LSTM",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "RNN",
)
"""Operators that multiply and accumulate as well."""

Macs = dict[str, int | None]
"""Multiply-accumulates by the name of the node; None where they cannot be counted."""


def count_macs(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> Macs:
    """Multiply-accumulates of every Conv, ConvTranspose, Gemm and MatMul node at the given input shapes, by node name.

    Conv: elements of the output times kernel size times input channels of a group. ConvTranspose: elements of the input
    times kernel size times output channels of a group. Gemm and MatMul: elements of the output times the inner dimension.
    None for a node whose shapes do not follow from those of the inputs, for one with such nodes in its subgraphs (If, Loop, Scan),
    and for operators that multiply and accumulate in another way (LSTM, Einsum).
    """
    fixed = with_sizes(model, shapes)
    names = {node: node.name or f"{node.op_type}_{index}" for index, node in enumerate(fixed.graph)}
    counts = {name: _macs(node) for node, name in names.items() if _multiplies(node)}
    if None not in counts.values():
        return counts
    try:
        fold_constants(fixed)  # shapes that the graph computes, as for im2col: they are constants once the input shapes are
    except Exception as error:  # what it evaluates is not ours; without it there is nothing more to be known
        logger.debug("constants cannot be folded: %s", first_line(error))
        return counts
    infer_shapes(fixed)
    folded = {node.name: _macs(node) for node in fixed.graph if _multiplies(node)}
    return {name: count if count is not None else folded.get(name) for name, count in counts.items()}


def count_in_branches(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> Macs:
    """Multiply-accumulates of the Conv, ConvTranspose, Gemm and MatMul nodes in the branches of If, as if each branch ran once.

    They are counted as `count_macs` counts. The names of nodes in branches must be unique.
    """
    if not any(branches(node) for node in model.graph):
        return {}
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(slim_proto(with_sizes(model, shapes)), data_prop=True))
    nodes = (node for node in branched_nodes(inferred.graph) if node.graph is not inferred.graph)
    return {node.name or "": _macs(node) for node in nodes if node.op_type in COUNTED}


def _multiplies(node: ir.Node) -> bool:
    return any(each.op_type in (*COUNTED, *_UNCOUNTED) for each in (node, *inner_nodes(node)))


def _macs(node: ir.Node) -> int | None:
    if node.op_type not in COUNTED:
        return None
    first, second, result = (_sizes(value) for value in (*node.inputs[:2], node.outputs[0]))
    if first is None or second is None or result is None:
        return None
    output = math.prod(result)
    if node.op_type == "Conv":  # weight: output channels, input channels of a group, kernel
        return output * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weight: input channels, output channels of a group, kernel
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Gemm":
        return output * first[0 if node.attributes.get_int("transA", 0) else 1]
    return output * first[-1]


def _sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    shape = value.const_value.shape if value.const_value is not None else value.shape
    sizes = [dim for dim in shape if isinstance(dim, int)] if shape is not None else []
    return tuple(sizes) if shape is not None and len(sizes) == len(shape) else None
