"""How much of a quantized ONNX file is INT8, whoever wrote it."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from deploy.artifact.onnxfile import load_model
from deploy.precision.int8.placement import PASS_THROUGH, WEIGHTED
from deploy.precision.macs import count_macs


def int8_share(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """The share, 0 to 1, of the multiply-accumulates of layers with weights whose operands are both INT8.

    shapes: of the inputs.
    """
    model = load_model(path)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{index}"
    macs = count_macs(model, shapes)
    done = total = 0
    for node in model.graph:
        if node.op_type in WEIGHTED and _origin(node.inputs[1])[0]:
            count = macs[node.name or ""] or 0
            total += count
            done += count * all(_origin(value)[1] for value in node.inputs[:2])
    return done / total


def _origin(value: ir.Value | None) -> tuple[bool, bool]:
    """Whether a tensor is a constant, and whether it was INT8 on the way."""
    quantized = False
    while value is not None and (node := value.producer()) is not None:
        quantized |= node.op_type == "DequantizeLinear"
        if node.op_type not in (*PASS_THROUGH, "DequantizeLinear", "QuantizeLinear") or not node.inputs:
            return node.op_type == "Constant", quantized
        value = node.inputs[0]
    return value is not None and value.is_initializer(), quantized
