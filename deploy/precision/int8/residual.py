"""Residual sums: which operand of a sum is quantized beside the layer that makes the other."""

from collections.abc import Collection, Iterable

import onnx_ir as ir

from deploy.precision.graph import STANDARD
from deploy.precision.int8.branches import branched_nodes
from deploy.precision.int8.rules import WEIGHTED


def residual_skips(graph: ir.Graph, layers: Collection[ir.Node], asked: Collection[ir.Node]) -> Iterable[tuple[ir.Node, int]]:
    """Every residual Add with the index of its skip input; the other input comes directly from a quantized layer.

    If both inputs do, the skip input is the one computed earlier: TensorRT computes the sum inside the later layer. Sums behind
    Gemm and MatMul are left alone: the residual stream of a transformer has channels of a hundred times the others, and NVIDIA's
    quantizer has the rule for backbones of convolutions alone.
    """
    order = {node: place for place, node in enumerate(branched_nodes(graph))}
    for node in order:
        if not _is(node, ("Add",)) or node in asked or node.inputs[0] is node.inputs[1]:
            continue
        made = [_layer_before(value) for value in node.inputs]
        found = [index for index, layer in enumerate(made) if layer in layers and _is(layer, ("Conv", "ConvTranspose"))]  # type: ignore[arg-type]
        if not found or any(value is None or value.is_initializer() for value in node.inputs) or not _same_shape(*node.inputs):
            continue
        main = max(found, key=lambda index: order[made[index]])  # type: ignore[index]
        yield node, 1 - main


def _layer_before(value: ir.Value | None) -> ir.Node | None:
    """The Conv, ConvTranspose, Gemm or MatMul that directly makes `value`, which must be used once; an added bias is skipped."""
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None or _is(node, WEIGHTED):
            return node
        constants = [index for index, operand in enumerate(node.inputs) if operand is not None and operand.is_initializer()]
        if not _is(node, ("Add",)) or len(constants) != 1:
            return None
        value = node.inputs[1 - constants[0]]
    return None


def _same_shape(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether the known parts of the shapes allow that neither is broadcast to the other."""
    if first is None or second is None or first.shape is None or second.shape is None:
        return True
    if len(first.shape) != len(second.shape):
        return False
    return all(a == b or (not (isinstance(a, int) and isinstance(b, int)) and 1 not in (a, b)) for a, b in zip(first.shape, second.shape, strict=True))  # fmt: skip


def _is(node: ir.Node, operators: Collection[str]) -> bool:
    return node.op_type in operators and node.domain in STANDARD
