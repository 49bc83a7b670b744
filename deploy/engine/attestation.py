"""What precision a network computes in, read back from what the parser built, not from what was asked for."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.artifact import Exclusion, PrecisionShare
from deploy.errors import EngineError

HONOURED = 0.9
"""Share of the multiply-accumulates, outside the reported exclusions, that must run in the precision asked for."""


def network_share(network: Any, trt: Any, macs: Mapping[str, int]) -> tuple[PrecisionShare, dict[str, str]]:
    """Share of `macs` (by ONNX node name) in each precision, as the parser typed the network; and the precision by node.

    A layer computes in INT8 when both its operands, activation and weight, come out of DequantizeLinear of INT8, with
    nothing between but changes of shape: TensorRT folds the pairs into the layer. Raises EngineError when a counted node
    has no layer in the network.
    """
    names = {
        trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16", trt.DataType.INT8: "int8",
    }  # fmt: skip
    compute = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    by_node: dict[str, str] = {}
    for layer in layers:
        if layer.type not in compute:
            continue
        operands = [layer.get_input(index) for index in range(2)]
        quantized = all(operand is not None and _is_int8(operand, producers, trt) for operand in operands)
        precision = "int8" if quantized else names.get(operands[0].dtype, "fp32")
        for node in re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer.metadata or "") or [layer.name]:
            by_node[node] = precision
    missing = [node for node, count in macs.items() if count and node not in by_node]
    if missing:
        raise EngineError(f"the parsed network has no layer for {', '.join(missing[:10])}: its precision cannot be attested")
    totals = dict.fromkeys(("int8", "fp16", "bf16", "fp32"), 0)
    for node, count in macs.items():
        if count:
            totals[by_node[node]] += count
    whole = sum(totals.values())
    share = {name: total / whole if whole else 0.0 for name, total in totals.items()}
    return PrecisionShare(**share, origin="network"), by_node


def _is_int8(tensor: Any, producers: Mapping[str, Any], trt: Any) -> bool:
    """Whether `tensor` comes out of DequantizeLinear of INT8; the parser puts changes of shape before 1-D convolutions
    and products with fewer dimensions on one side."""
    reshaping = (trt.LayerType.SHUFFLE, trt.LayerType.UNSQUEEZE, trt.LayerType.SQUEEZE)
    layer = producers.get(tensor.name)
    while layer is not None and layer.type in reshaping:
        layer = producers.get(layer.get_input(0).name)
    return layer is not None and layer.type == trt.LayerType.DEQUANTIZE and layer.get_input(0).dtype == trt.DataType.INT8


def check_honoured(
    wanted: str, by_node: Mapping[str, str], macs: Mapping[str, int], exclusions: Sequence[Exclusion], what: str
) -> None:
    """Raise EngineError when under `HONOURED` of the multiply-accumulates outside `exclusions` run in `wanted`."""
    excluded = {exclusion.node for exclusion in exclusions}
    counted = {node: count for node, count in macs.items() if count and node not in excluded}
    whole = sum(counted.values())
    honoured = sum(count for node, count in counted.items() if by_node[node] == wanted)
    if whole and honoured < HONOURED * whole:
        others = [
            f"{node} ({by_node[node]})"
            for node in sorted(counted, key=counted.__getitem__, reverse=True)
            if by_node[node] != wanted
        ]
        raise EngineError(
            f"{what}: {wanted} was asked for, and {honoured / whole:.0%} of the multiply-accumulates run in it"
            f" (at least {HONOURED:.0%} is expected); the largest others: {', '.join(others[:5])}"
        )
