"""The pass that folds BatchNormalization into the layer before it, so that what is quantized is what runs."""

import onnx_ir as ir
from onnx_ir.passes import PassResult
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

from deploy.precision.graph import STANDARD
from deploy.precision.passes import PREPARED, VALID, Condition, PrecisionPass

_RULES = {
    "Conv": fuse_batchnorm_into_conv_rule,
    "ConvTranspose": fuse_batchnorm_into_conv_transpose_rule,
    "Gemm": fuse_batchnorm_into_gemm_rule,
}


def _foldable(model: ir.Model) -> str:
    for node in model.graph:
        if not _is_batchnorm(node) or node.inputs[0] is None:
            continue
        layer = node.inputs[0].producer()
        if layer is None or layer.op_type not in _RULES or len(layer.outputs[0].uses()) > 1 or layer.outputs[0].is_graph_output():
            continue
        if all(map(_is_constant, (*layer.inputs[1:], *node.inputs[1:]))) and all(map(_used_once, layer.inputs[1:])):
            return f"{node.name!r} can be folded into {layer.name!r}"
    return ""


FOLDED = Condition("no BatchNormalization can be folded into the layer before it", _foldable)


class FoldBatchNorm(PrecisionPass):
    """The same computation with every BatchNormalization that follows a Conv, ConvTranspose or Gemm folded into it.

    The layer keeps its name and takes over the name of the output of its BatchNormalization. A BatchNormalization is not
    folded if the layer's output or parameters have other users, or if the graph computes any of the parameters.
    """

    needs = PREPARED
    leaves = (*PREPARED, FOLDED, VALID)

    def call(self, model: ir.Model) -> PassResult:
        names: dict[str | None, str | None] = {}  # output of a BatchNormalization -> name of the layer before it
        for node in model.graph:
            if _is_batchnorm(node) and (layer := _layer_before(node)) is not None:
                names[node.outputs[0].name] = layer.name
        if not names:
            return PassResult(model, False)
        folded = sum(rule.apply_to_model(model) for rule in _RULES.values())
        for node in model.graph:
            if node.op_type in _RULES and node.outputs[0].name in names:  # the library makes a new node, without the name
                node.name = names[node.outputs[0].name]
        return PassResult(model, folded > 0)


def _layer_before(node: ir.Node) -> ir.Node | None:
    """The layer that makes the input of a BatchNormalization; others may stand between the two."""
    producer: ir.Node | None = node
    while producer is not None and _is_batchnorm(producer):
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer if producer is not None and producer.op_type in _RULES else None


def _is_batchnorm(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization" and node.domain in STANDARD


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def _used_once(value: ir.Value | None) -> bool:
    return value is not None and len(value.uses()) == 1
