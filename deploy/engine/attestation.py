"""The precision that a network or an engine computes in, read back from what was built, not from what was requested."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy.artifact.manifest import COMPUTE_PRECISIONS, QUANTIZED, Exclusion, PrecisionShare
from deploy.engine.bindings import Bindings
from deploy.engine.layers import EngineLayer, nodes_in
from deploy.errors import EngineError

if TYPE_CHECKING:
    import tensorrt

HONOURED = 0.9
"""The share of the multiply-accumulates, outside the reported exclusions, that must run in the requested precision."""

ATTESTED = 0.9
"""The share of the multiply-accumulates whose precision the inspector must tell before an engine is called attested."""


def network_share(
    network: "tensorrt.INetworkDefinition", trt: Bindings, macs: Mapping[str, int | None]
) -> tuple[PrecisionShare, dict[str, str]]:
    """The share of `macs` (by ONNX node name) in each precision, as the parser typed the network; and the precision by node.

    Nodes whose multiply-accumulates are None, for they cannot be counted, or that have no layer of their own, are unknown.

    A layer computes in INT8 or FP8 if both its operands, activation and weight, come from DequantizeLinear of that, with at most
    changes of shape in between: TensorRT folds the pairs into the layer. Raises EngineError if no counted node has a layer in the network.
    """
    names = {
        trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16", trt.DataType.INT8: "int8",
        trt.DataType.FP8: "fp8",
    }  # fmt: skip
    compute = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    by_node: dict[str, str] = {}
    for layer in layers:
        if layer.type not in compute:
            continue
        operands = [layer.get_input(index) for index in range(2)]
        codes = {_codes_of(operand, producers, trt) if operand is not None else None for operand in operands}
        precision = (codes.pop() if len(codes) == 1 else None) or names.get(operands[0].dtype, "fp32")
        for node in nodes_in(layer.metadata or "") or [layer.name]:
            by_node[node] = precision
    counted = [node for node, count in macs.items() if count]
    if counted and not any(node in by_node for node in counted):
        raise EngineError(f"the parsed network has no layer for {', '.join(counted[:10])}: its precision cannot be attested")
    return PrecisionShare(**_mac_shares(by_node, macs), origin="network", unknown=_unknown(by_node, macs)), by_node


def engine_share(
    layers: Sequence[EngineLayer], typed: Mapping[str, str], macs: Mapping[str, int | None], times: Mapping[str, float]
) -> tuple[PrecisionShare, dict[str, str]]:
    """The share of `macs` in each precision as the engine was built, and the precision by node.

    typed: the precision by node in the typed network. It stands for nodes of which the inspector does not tell the precision:
        TensorRT drops names when it compiles many nodes into one kernel, but keeps the types. `coverage` of the share says how
        much the inspector tells; under `ATTESTED` of it, the origin of the share is the network.
    times: milliseconds by layer; may be empty.
    """
    told = {node: built for node, built in _told(layers, typed).items() if node in macs}
    by_node = {**typed, **{node: built.precision for node, built in told.items() if built.precision is not None}}
    weights = _weights(macs)
    whole = sum(weights.values())
    coverage = sum(weights[node] for node in told if node in weights) / whole if whole else 1.0
    half = sum(weights[node] for node, built in told.items() if node in weights and built.precision == built.sums == "fp16")
    counted = _shares((built.precision, 1) for built in layers)
    timed = _shares((built.precision, times[built.name]) for built in layers if built.name in times)
    share = PrecisionShare(
        **_mac_shares(by_node, macs),
        origin="engine" if coverage >= ATTESTED else "network",
        layers=counted,
        time=timed or None,
        unknown=_unknown(by_node, macs),
        coverage=coverage,
        fp16_sums=half / whole if whole else 0.0,
    )
    return share, by_node


def _told(layers: Sequence[EngineLayer], typed: Mapping[str, str]) -> dict[str, EngineLayer]:
    """By node, the layer that tells its precision.

    Layers that compute products tell more than generated code, and those that move data tell nothing. Where two that count alike
    disagree, the precision is not known. Weights in INT8 or FP8 alone do not say that the activations are: the network must say so too.
    """
    named: dict[str, dict[str, list[EngineLayer]]] = {}
    for built in layers:
        for node in built.nodes:
            named.setdefault(node, {}).setdefault(built.role, []).append(built)
    told = {}
    for node, roles in named.items():
        candidates = roles.get("computes") or roles.get("fused") or []
        precisions = {each.precision for each in candidates}
        if len(precisions) != 1 or None in precisions:
            continue
        if candidates[0].by_weights and candidates[0].precision in QUANTIZED and candidates[0].precision != typed.get(node):
            continue
        told[node] = candidates[0]
    return told


def _weights(macs: Mapping[str, int | None]) -> dict[str, int]:
    """The multiply-accumulates of the nodes that have any; where none can be counted, every node counts as one."""
    return {node: count for node, count in macs.items() if count} or {node: 1 for node, count in macs.items() if count is None}


def _shares(weighted: Iterable[tuple[str | None, float]]) -> dict[str, float]:
    """The share of each precision in the total weight; those that are not known are `unknown`."""
    totals: dict[str, float] = {}
    for precision, weight in weighted:
        totals[precision or "unknown"] = totals.get(precision or "unknown", 0.0) + weight
    whole = sum(totals.values())
    return {name: total / whole for name, total in totals.items() if total}


def _mac_shares(by_node: Mapping[str, str], macs: Mapping[str, int | None]) -> dict[str, Any]:
    found = _shares((by_node[node], count) for node, count in macs.items() if count and node in by_node)
    return {name: found.get(name, 0.0) for name in COMPUTE_PRECISIONS}


def _unknown(by_node: Mapping[str, str], macs: Mapping[str, int | None]) -> int:
    """How many nodes have multiply-accumulates of which it is not known how many, or in which precision."""
    return sum(count is None or (count > 0 and node not in by_node) for node, count in macs.items())


def _codes_of(tensor: "tensorrt.ITensor", producers: Mapping[str, "tensorrt.ILayer"], trt: Bindings) -> str | None:
    """`int8` or `fp8` where `tensor` comes from DequantizeLinear of that, directly or through changes of shape.

    The parser adds those before 1-D convolutions and before products with fewer dimensions on one side.
    """
    reshaping = (trt.LayerType.SHUFFLE, trt.LayerType.UNSQUEEZE, trt.LayerType.SQUEEZE)
    layer = producers.get(tensor.name)
    while layer is not None and layer.type in reshaping:
        layer = producers.get(layer.get_input(0).name)
    if layer is None or layer.type != trt.LayerType.DEQUANTIZE:
        return None
    return {trt.DataType.INT8: "int8", trt.DataType.FP8: "fp8"}.get(layer.get_input(0).dtype)


def check_honoured(
    wanted: str,
    by_node: Mapping[str, str],
    macs: Mapping[str, int | None],
    exclusions: Sequence[Exclusion],
    what: str,
    *,
    tf32: bool = False,
) -> None:
    """Raise EngineError if less than `HONOURED` of the multiply-accumulates outside `exclusions` run in `wanted`.

    Where none can be counted, every node with a layer of its own counts as one. tf32: TF32 is taken for FP32.
    """
    excluded = {exclusion.node for exclusion in exclusions}
    known = {node: count for node, count in macs.items() if node in by_node and node not in excluded}
    weights = _weights(known)
    unit = (
        "layers, whose multiply-accumulates cannot be counted," if not any(known.values()) and known else "multiply-accumulates"
    )
    whole = sum(weights.values())
    taken = {wanted, "tf32"} if tf32 and wanted == "fp32" else {wanted}
    honoured = sum(count for node, count in weights.items() if by_node[node] in taken)
    if whole and honoured < HONOURED * whole:
        largest = sorted(weights, key=weights.__getitem__, reverse=True)
        others = [f"{node} ({by_node[node]})" for node in largest if by_node[node] not in taken]
        raise EngineError(
            f"{what}: {wanted} was asked for, and {honoured / whole:.0%} of the {unit} run in it"
            f" (at least {HONOURED:.0%} is expected); the largest others: {', '.join(others[:5])}"
        )
