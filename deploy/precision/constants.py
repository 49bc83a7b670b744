"""The pass that computes once what does not depend on the input, such as weights in FP16 behind a Cast to FP32."""

import logging

import onnx_ir as ir
from onnx_ir.passes import PassResult
from onnxscript.optimizer import fold_constants

from deploy.precision.graph import STANDARD, inner_nodes
from deploy.precision.passes import PREPARED, VALID, PrecisionPass
from deploy.precision.prepare import Prepare

_WEIGHTS = frozenset(("Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"))
"""Operators whose results are no larger than FP32 weights, which are folded whatever their size."""

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


class FoldConstants(PrecisionPass):
    """The same computation without the nodes that depend on no input; an If of a constant condition becomes its branch.

    What would grow much larger, as by ConstantOfShape or Expand, stays; so do pairs of Q/DQ.
    """

    needs = PREPARED
    leaves = (*PREPARED, VALID)

    def call(self, model: ir.Model) -> PassResult:
        logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)
        shapes = [value.shape for value in model.graph.outputs]
        if not fold_constants(model, should_fold=_should_fold).modified:
            return PassResult(model, False)
        for value, shape in zip(model.graph.outputs, shapes, strict=True):
            value.shape = value.shape or shape  # a branch that replaces its If declares none
        Prepare()(model)
        return PassResult(model, True)


def _should_fold(node: ir.Node) -> bool | None:
    """True whatever the size, False never, None by the library's own limits."""
    if any(each.op_type in _QUANTIZED for each in (node, *inner_nodes(node))):
        return False
    constant = node.inputs and all(value is None or _is_constant(value) for value in node.inputs)
    return True if constant and node.op_type in _WEIGHTS and node.domain in STANDARD else None


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()
