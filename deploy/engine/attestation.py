"""The precision that a network or an engine computes in, read back from what was built, not from what was requested."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deploy.artifact.manifest import Exclusion, PrecisionShare
from deploy.engine.bindings import Bindings
from deploy.errors import EngineError

if TYPE_CHECKING:
    import tensorrt

HONOURED = 0.9
"""The share of the multiply-accumulates, outside the reported exclusions, that must run in the requested precision."""


def network_share(
    network: "tensorrt.INetworkDefinition", trt: Bindings, macs: Mapping[str, int | None]
) -> tuple[PrecisionShare, dict[str, str]]:
    """The share of `macs` (by ONNX node name) in each precision, as the parser typed the network; and the precision by node.

    Nodes whose multiply-accumulates are None, for they cannot be counted, or that have no layer of their own, are unknown.

    A layer computes in INT8 if both its operands, activation and weight, come from DequantizeLinear of INT8, with at most changes
    of shape in between: TensorRT folds the pairs into the layer. Raises EngineError if no counted node has a layer in the network.
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
        for node in _NODE.findall(layer.metadata or "") or [layer.name]:
            by_node[node] = precision
    counted = [node for node, count in macs.items() if count]
    if counted and not any(node in by_node for node in counted):
        raise EngineError(f"the parsed network has no layer for {', '.join(counted[:10])}: its precision cannot be attested")
    return _record(_mac_shares(by_node, macs), "network", unknown=_unknown(by_node, macs)), by_node


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """A layer of a built engine: TensorRT's name for its kind, the ONNX nodes fused into it, and its precision."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    precision: str
    computes: bool


def engine_layers(information: str) -> list[EngineLayer]:
    """The layers in the inspector's JSON description of an engine that was built with detailed verbosity.

    A tactic that names the types of its operands (`..._i8i8_i8i32_f32_...`) computes in the first of them; any other computes in
    the type of its first input. Raises EngineError if the description cannot be read.
    """
    try:
        described = json.loads(information)["Layers"]
        return [_layer(layer) for layer in described]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"the inspector's description of the engine cannot be read: {error!r}") from error


def engine_share(
    layers: Sequence[EngineLayer], typed: Mapping[str, str], macs: Mapping[str, int | None], times: Mapping[str, float]
) -> tuple[PrecisionShare, dict[str, str]]:
    """The share of `macs` in each precision as the engine was built, and the precision by node.

    typed: the precision by node in the typed network, for nodes that the inspector does not name: TensorRT drops the names when
        it compiles many nodes into one kernel, but keeps the types. times: milliseconds by layer; may be empty.
    """
    by_node = dict(typed)
    for built in sorted(layers, key=lambda built: built.computes):  # layers that compute come last: the others only move data
        for node in built.nodes:
            if node in macs:
                by_node[node] = built.precision
    timed = [(built.precision, times[built.name]) for built in layers if built.name in times]
    counted = _shares((built.precision, 1) for built in layers)
    time = _shares(timed) if timed else None
    return _record(_mac_shares(by_node, macs), "engine", counted, time, unknown=_unknown(by_node, macs)), by_node


_NODE = re.compile(r"\[ONNX Layer: ([^\x1e]+?)\](?=\x1e|\[ONNX Layer: |$)")
"""A node in the metadata of a layer; its name may have brackets. TensorRT puts a record separator between nodes."""
_TACTIC = re.compile(r"_(i8|s8|e4m3|f16|h|bf16|tf32|f32)(?:i8|s8|e4m3|f16|bf16|tf32|f32|i32)*_")
_OPERANDS = {"i8": "int8", "s8": "int8", "f16": "fp16", "h": "fp16", "bf16": "bf16", "tf32": "fp32", "f32": "fp32"}
_TYPES = (("int8", "int8"), ("bf16", "bf16"), ("bfloat16", "bf16"), ("half", "fp16"), ("fp16", "fp16"))
"""The words in the description of a format, in lower case, and the precision they mean; anything else is FP32."""
_COMPUTES = re.compile(r"conv|gemm|matmul|matrixmultiply|xmma|cutlass|fprop|dgrad", re.IGNORECASE)


def _layer(described: Mapping[str, Any] | str) -> EngineLayer:
    if isinstance(described, str):  # without detailed verbosity there are only names
        raise TypeError("layers are names alone: the engine was built without detailed verbosity")
    tactic = described.get("TacticName") or ""
    kind = f"{described.get('LayerType', '')} {tactic}"
    named = _TACTIC.search(tactic)
    inputs = described.get("Inputs") or [{}]
    precision = _OPERANDS.get(named[1]) if named else None
    if precision is None:
        text = str(inputs[0].get("Format/Datatype", "")).lower()
        precision = next((name for part, name in _TYPES if part in text), "fp32")
    return EngineLayer(
        name=described["Name"],
        kind=described.get("LayerType") or "",
        nodes=tuple(_NODE.findall(described.get("Metadata") or "")),
        precision=precision,
        computes=bool(_COMPUTES.search(kind)),
    )


def _shares(weighted: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The share of each precision in the total weight."""
    totals = dict.fromkeys(("int8", "fp16", "bf16", "fp32"), 0.0)
    for precision, weight in weighted:
        totals[precision] += weight
    whole = sum(totals.values())
    return {name: total / whole if whole else 0.0 for name, total in totals.items()}


def _mac_shares(by_node: Mapping[str, str], macs: Mapping[str, int | None]) -> dict[str, float]:
    return _shares((by_node[node], count) for node, count in macs.items() if count and node in by_node)


def _unknown(by_node: Mapping[str, str], macs: Mapping[str, int | None]) -> int:
    """How many nodes have multiply-accumulates of which it is not known how many, or in which precision."""
    return sum(count is None or (count > 0 and node not in by_node) for node, count in macs.items())


def _record(
    shares: Mapping[str, float],
    origin: Literal["engine", "network"],
    layers: dict[str, float] | None = None,
    time: dict[str, float] | None = None,
    *,
    unknown: int,
) -> PrecisionShare:
    return PrecisionShare(
        int8=shares["int8"],
        fp16=shares["fp16"],
        bf16=shares["bf16"],
        fp32=shares["fp32"],
        origin=origin,
        layers=layers,
        time=time,
        unknown=unknown,
    )


def _is_int8(tensor: "tensorrt.ITensor", producers: Mapping[str, "tensorrt.ILayer"], trt: Bindings) -> bool:
    """Whether `tensor` comes from DequantizeLinear of INT8, directly or through changes of shape.

    The parser adds those before 1-D convolutions and before products with fewer dimensions on one side.
    """
    reshaping = (trt.LayerType.SHUFFLE, trt.LayerType.UNSQUEEZE, trt.LayerType.SQUEEZE)
    layer = producers.get(tensor.name)
    while layer is not None and layer.type in reshaping:
        layer = producers.get(layer.get_input(0).name)
    return layer is not None and layer.type == trt.LayerType.DEQUANTIZE and layer.get_input(0).dtype == trt.DataType.INT8


def check_honoured(
    wanted: str, by_node: Mapping[str, str], macs: Mapping[str, int | None], exclusions: Sequence[Exclusion], what: str
) -> None:
    """Raise EngineError if less than `HONOURED` of the multiply-accumulates outside `exclusions` run in `wanted`.

    Where none can be counted, every node with a layer of its own counts as one.
    """
    excluded = {exclusion.node for exclusion in exclusions}
    known = {node: count for node, count in macs.items() if count != 0 and node in by_node and node not in excluded}
    counted = {node: count for node, count in known.items() if count is not None}
    unit = "multiply-accumulates" if counted or not known else "layers, whose multiply-accumulates cannot be counted,"
    counted = counted or dict.fromkeys(known, 1)
    whole = sum(counted.values())
    honoured = sum(count for node, count in counted.items() if by_node[node] == wanted)
    if whole and honoured < HONOURED * whole:
        others = [
            f"{node} ({by_node[node]})"
            for node in sorted(counted, key=counted.__getitem__, reverse=True)
            if by_node[node] != wanted
        ]
        raise EngineError(
            f"{what}: {wanted} was asked for, and {honoured / whole:.0%} of the {unit} run in it"
            f" (at least {HONOURED:.0%} is expected); the largest others: {', '.join(others[:5])}"
        )
