"""BatchNormalization folded into the layer before it: what is quantized is what runs."""

import onnx
import onnx_ir as ir
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

from deploy.precision.graph import STANDARD, check

_RULES = {
    "Conv": fuse_batchnorm_into_conv_rule,
    "ConvTranspose": fuse_batchnorm_into_conv_transpose_rule,
    "Gemm": fuse_batchnorm_into_gemm_rule,
}


def fold_batchnorm(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same computation with every BatchNormalization that follows a Conv, ConvTranspose or Gemm folded into it.

    `model` is prepared (`deploy.precision.graph.prepare`). A layer keeps its name and takes over the name of the output
    of its BatchNormalization. One whose output or whose parameters something else uses too, or whose parameters the graph
    computes, stays. Raises PrecisionError when the result is not valid.
    """
    graph = ir.from_proto(model)
    folded: dict[str, str | None] = {}  # output of the BatchNormalization -> name of the layer
    for node in graph.graph:
        layer = node.inputs[0].producer() if _is(node, "BatchNormalization") and node.inputs[0] is not None else None
        if layer is not None and layer.op_type in _RULES and node.outputs[0].name:
            folded[node.outputs[0].name] = layer.name
    if not folded:
        return model
    for rule in _RULES.values():
        rule.apply_to_model(graph)
    for node in graph.graph:
        if node.op_type in _RULES and node.outputs[0].name in folded:  # the library makes a new node, without the name
            node.name = folded[node.outputs[0].name]
    check(graph, "the graph is not valid with its BatchNormalization folded")
    return ir.to_proto(graph)


def _is(node: ir.Node, operator: str) -> bool:
    return node.op_type == operator and node.domain in STANDARD
