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

    A layer computes in INT8 when its inputs come out of DequantizeLinear: TensorRT folds the pair into the layer.
    Raises EngineError when a counted node has no layer in the network.
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
        first = layer.get_input(0)
        producer = producers.get(first.name)
        quantized = producer is not None and producer.type == trt.LayerType.DEQUANTIZE
        precision = "int8" if quantized else names.get(first.dtype, "fp32")
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
