"""Where the Q/DQ pairs of a quantized graph go: only where TensorRT fuses them.

The rules are those of TensorRT's "Q/DQ Layer-Placement Recommendations": pairs stand before the inputs of weighted
layers, never between such a layer and its activation, and before the skip input of a residual sum, which TensorRT
computes inside the layer that makes the other input. Layers that only move or select numbers need no pair.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from deploy.artifact.manifest import Exclusion
from deploy.errors import PrecisionError
from deploy.precision.codes import CodesName
from deploy.precision.graph import STANDARD
from deploy.precision.half.plan import is_float
from deploy.precision.int8.branches import branched_nodes, reads
from deploy.precision.int8.residual import residual_skips
from deploy.precision.int8.rules import WEIGHTED, rule_for
from deploy.words import did_you_mean

QUANTIZED = (*WEIGHTED, "AveragePool", "GlobalAveragePool")
"""Operators whose inputs are quantized."""

PASS_THROUGH = frozenset(
    (
        "DepthToSpace", "Flatten", "Identity", "MaxPool", "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze",
        "Transpose", "Unsqueeze",
    )
)  # fmt: skip
"""Operators that only move or select the numbers of their first input, so that INT8 passes through them unchanged. For
Resize, this holds in the mode `nearest`."""


class NothingToQuantizeError(PrecisionError):
    """A graph without a layer that can be INT8."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which nodes to leave in floating point, and what the others are quantized to.

    exclude: names of nodes (`layer4.0.conv1/Conv`) or of their modules (`layer4.0.conv1`), operators (`MatMul`: all of
        them), or patterns of names (`layer4*`).
    include: likewise, what `deploy.precision.int8.rules` would leave in floating point and is to be quantized.
    float_first: the layers with weights that have no other such layer before them.
    float_last: the layers with weights that have no other such layer after them.
    """

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    float_first: bool = False
    float_last: bool = False
    codes: CodesName = "int8"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight that is quantized: its initializer, and the axis with one scale for each index, or None for a single scale."""

    initializer: str
    axis: int | None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the Q/DQ pairs go.

    nodes: names of the quantized Conv, ConvTranspose, Gemm and MatMul, in the order of the graph.
    edges: by activation tensor, the inputs (node, index) that read it through its pair, in the order of the graph.
    groups: tensors of `edges` that share one scale where their ranges are alike. No tensor is in two groups.
    joints: every Concat that joins codes, and its output; its branches share the scale of that.
    weights: the quantized weight by node; a MatMul of two activations has none.
    excluded: layers with an operator in QUANTIZED that are not quantized, with the reason.
    left: names of all nodes that were to stay in floating point, whatever their operator.
    included: names of all nodes that no rule may leave in floating point.
    """

    nodes: tuple[str, ...]
    edges: dict[str, tuple[tuple[str, int], ...]]
    groups: tuple[tuple[str, ...], ...]
    joints: dict[str, str]
    weights: dict[str, Weight]
    excluded: tuple[Exclusion, ...]
    left: frozenset[str]
    included: frozenset[str] = frozenset()


def place(model: ir.Model, selection: Selection, *, stay: Mapping[str, str] | None = None) -> Placement:
    """Where the Q/DQ pairs of a prepared model go.

    `stay`: further nodes to leave in floating point, by name, with the reason.

    Raises PrecisionError for a graph that is quantized already or has nothing to quantize, and for an entry of
    `selection.exclude` or `selection.include` that nothing matches.
    """
    graph = model.graph
    _refuse_quantized(graph)
    activations = _activations(graph)
    layers: dict[ir.Node, _Layer] = {}
    left: dict[ir.Node, str] = {}
    once = set(branched_nodes(graph))
    for node in graph.all_nodes():
        if _is(node, QUANTIZED):
            layer = _layer(node, activations) if node in once else "it is in the body of a loop"
            if isinstance(layer, str):
                left[node] = layer
            else:
                layers[node] = layer
    included = {node for entry in selection.include for node in _matched(graph, entry, "inclusion")}
    for node in [node for node in layers if node not in included]:
        if (rule := rule_for(node, selection.codes)) is not None:
            left[node] = rule.reason
            del layers[node]
    asked = _asked(graph, layers, selection, stay or {})
    for node in [node for node in layers if node in asked]:
        del layers[node]
    left |= asked
    nodes = tuple(_name(node) for node in layers if node.op_type in WEIGHTED)
    if not nodes:
        reasons = sorted({f"{node.op_type} {node.name!r}: {reason}" for node, reason in left.items() if _is(node, WEIGHTED)})
        raise NothingToQuantizeError(
            f"nothing to quantize: the graph has no {', '.join(WEIGHTED)} for {selection.codes.upper()}"
            + (f" ({reasons[0]})" if reasons else "")
        )
    edges = _Edges(graph, activations, asked, joins=selection.codes == "int8")
    for node, quantized in layers.items():
        for index in quantized.inputs:
            edges.add(node, index)
    if selection.codes == "int8":  # FP8 is for products alone
        for node, index in residual_skips(graph, layers.keys(), asked):
            edges.add(node, index)
    edges.add_branches()
    return Placement(
        nodes=nodes,
        edges=edges.by_name(),
        groups=edges.groups(),
        joints=edges.joints(),
        weights={_name(node): quantized.weight for node, quantized in layers.items() if quantized.weight is not None},
        excluded=tuple(
            Exclusion(node=_name(node), reason=left[node]) for node in graph.all_nodes() if node in left and _is(node, QUANTIZED)
        ),
        left=frozenset(map(_name, left)),
        included=frozenset(map(_name, included)),
    )


@dataclass(frozen=True)
class _Layer:
    """Indices of the inputs of a node that are quantized activations, and its weight."""

    inputs: tuple[int, ...]
    weight: Weight | None = None


def _layer(node: ir.Node, activations: Collection[ir.Value]) -> _Layer | str:
    """The inputs and the weight of `node` to quantize, or the reason why it cannot be quantized."""
    first = node.inputs[0]
    if node.op_type not in WEIGHTED:
        return _Layer((0,)) if first in activations else "its input is no FP32 data"
    second = node.inputs[1]
    if node.op_type == "MatMul" and second in activations:
        if first not in activations:
            return "its left operand is a constant"
        return "it multiplies by a vector" if 1 in (_rank(first), _rank(second)) else _Layer((0, 1))
    if first not in activations:
        return "its input is no FP32 data"
    if second is None or not second.is_initializer() or not is_float(second) or second.const_value is None:
        return "its weight is not an FP32 constant"
    if node.op_type == "Gemm":
        scaled = any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
        if scaled or node.attributes.get_int("transA", 0) != 0:
            return "it scales its operands (alpha, beta) or transposes its input (transA)"
    rank = len(second.const_value.shape)
    if rank < 2:
        return "it multiplies by a vector"
    return _Layer((0,), Weight(initializer=second.name or "", axis=_channel_axis(node, rank)))


def _channel_axis(node: ir.Node, rank: int) -> int | None:
    """The axis of a weight with one scale for each index; None where a weight must have a single scale.

    TensorRT's kernels for transposed convolutions take scales along the *input* channels, and give wrong results for
    scales along the output channels (https://github.com/NVIDIA/TensorRT/issues/1694 and 2380), while the other runtimes
    fuse only the latter: a single scale is right everywhere. A MatMul by a stack of matrices has a single scale too.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 1 if node.op_type == "MatMul" and rank == 2 else None


class _Edges:
    """Collects the inputs of nodes that get Q/DQ pairs, and determines which pairs share a scale.

    joins: a Concat may join codes; of FP8, ONNX has no Concat.
    """

    def __init__(self, graph: ir.Graph, activations: Collection[ir.Value], asked: Collection[ir.Node], *, joins: bool) -> None:
        self._joins = joins
        self._activations = activations
        self._asked = asked
        values = [*graph.inputs, *(value for node in branched_nodes(graph) for value in node.outputs)]
        self._values = {value: place for place, value in enumerate(values)}
        self._nodes = {node: place for place, node in enumerate(branched_nodes(graph))}
        self._uses: dict[ir.Value, list[tuple[ir.Node, int]]] = {}

    def add(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        assert value is not None
        self._uses.setdefault(value, []).append((node, index))

    def add_branches(self) -> None:
        """Quantize the branches of every Concat whose output reaches a quantized input."""
        pending = deque(self._uses)
        seen: set[ir.Node] = set()
        while pending:
            value: ir.Value | None = pending.popleft()
            while value is not None and (source := _passed_from(value)) is not None:
                value = source
            concat = value.producer() if value is not None else None
            if concat is not None and concat not in seen and self._shares(concat):
                seen.add(concat)
                for index, branch in enumerate(concat.inputs):
                    self.add(concat, index)
                    assert branch is not None
                    pending.append(branch)

    def by_name(self) -> dict[str, tuple[tuple[str, int], ...]]:
        return {
            _name(value): tuple(
                (_name(node), index) for node, index in sorted(uses, key=lambda use: (self._nodes[use[0]], use[1]))
            )
            for value, uses in sorted(self._uses.items(), key=lambda item: self._values[item[0]])
        }

    def joints(self) -> dict[str, str]:
        """Each Concat with quantized branches, and its output."""
        nodes = {node: None for uses in self._uses.values() for node, _ in uses if _is(node, ("Concat",))}
        return {_name(node): _name(node.outputs[0]) for node in nodes}

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Tensors that share a scale: those before and after nodes that only move numbers, and the branches of a Concat."""
        member = {value: {value} for value in self._uses}
        for value in self._uses:
            for other in self._sources(value):
                if member[value] is not member[other]:
                    member[value] |= member[other]
                    for moved in member[other]:
                        member[moved] = member[value]
        ordered = sorted(self._uses, key=self._values.__getitem__)
        unique = {id(member[value]): member[value] for value in ordered if len(member[value]) > 1}
        return tuple(tuple(_name(value) for value in ordered if value in group) for group in unique.values())

    def _sources(self, value: ir.Value) -> Iterable[ir.Value]:
        """The nearest quantized tensors before `value` that its numbers come from."""
        while (source := _passed_from(value)) is not None:
            value = source
            if value in self._uses:
                return [value]
        concat = value.producer()
        if concat is not None and self._shares(concat):
            return [branch for branch in concat.inputs if branch is not None]
        return []

    def _shares(self, node: ir.Node) -> bool:
        """Whether all branches of a Concat are FP32 data, so that they can share a scale."""
        return (
            self._joins
            and _is(node, ("Concat",))
            and node not in self._asked
            and all(value in self._activations for value in node.inputs)
        )


def _passed_from(value: ir.Value) -> ir.Value | None:
    """The tensor that the numbers of `value` come from, if its producer only moves or selects them; else None."""
    node = value.producer()
    if node is None or not _is(node, PASS_THROUGH):
        return None
    if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest":
        return None
    return node.inputs[0]


def _asked(
    graph: ir.Graph, layers: Mapping[ir.Node, _Layer], selection: Selection, stay: Mapping[str, str]
) -> dict[ir.Node, str]:
    """The nodes that `selection` and `stay` keep in floating point, with the reason. Raises PrecisionError."""
    nodes = list(graph.all_nodes())
    asked: dict[ir.Node, str] = {}
    staying = {node: stay[_name(node)] for node in nodes if node.name in stay}
    if unknown := set(stay) - {_name(node) for node in staying}:
        raise PrecisionError(f"no node is named {', '.join(map(repr, sorted(unknown)))}: nothing to keep in floating point")
    if selection.float_first:
        asked |= dict.fromkeys(_outermost(graph, layers, first=True), "the first layer stays in floating point")
    if selection.float_last:
        asked |= dict.fromkeys(_outermost(graph, layers, first=False), "the last layer stays in floating point")
    for entry in selection.exclude:
        asked |= dict.fromkeys(_matched(graph, entry, "exclusion"), f"excluded by {entry!r}")
    return asked | staying


def _matched(graph: ir.Graph, entry: str, what: str) -> list[ir.Node]:
    """The nodes that an entry of `selection` names. Raises PrecisionError if there are none."""
    nodes = list(graph.all_nodes())
    matched = (
        [node for node in nodes if node.name == entry]
        or [node for node in nodes if node.op_type == entry]
        or [node for node in nodes if _module(node) == entry]
        or [node for node in nodes if fnmatchcase(_name(node), entry)]
    )
    if not matched:
        names = list(dict.fromkeys([*map(_name, nodes), *filter(None, map(_module, nodes)), *(node.op_type for node in nodes)]))
        hint = did_you_mean(entry, names) or "; expected a node's name, an operator or a pattern of names"
        raise PrecisionError(f"the {what} {entry!r} matches no node of the graph{hint}")
    return matched


def _outermost(graph: ir.Graph, layers: Mapping[ir.Node, _Layer], *, first: bool) -> list[ir.Node]:
    """The layers with weights that have no other such layer before (`first`) or after them."""
    beyond: set[ir.Value] = set()
    found = []
    nodes = list(branched_nodes(graph))
    for node in nodes if first else reversed(nodes):
        near, far = (reads(node), node.outputs) if first else (node.outputs, reads(node))
        inner = any(value in beyond for value in near)
        weighted = node in layers and layers[node].weight is not None
        if weighted and not inner:
            found.append(node)
        if weighted or inner:
            beyond.update(value for value in far if value is not None)
    return found


def _refuse_quantized(graph: ir.Graph) -> None:
    for node in graph.all_nodes():
        name = node.op_type
        if name.endswith(("QuantizeLinear", "DequantizeLinear", "Integer")) or name.startswith(("QLinear", "DynamicQuantize")):
            raise PrecisionError(f"the graph is quantized already: {name} {node.name!r}; give the FP32 artifact it was made from")


def _activations(graph: ir.Graph) -> set[ir.Value]:
    """FP32 values of a graph and its branches that depend on the content of its inputs, not only on their shapes."""
    live = set(graph.inputs)
    for node in branched_nodes(graph):
        nested = any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
        )
        if nested or (not _is(node, ("Shape", "Size")) and any(value in live for value in node.inputs)):
            live.update(node.outputs)
    return {value for value in live if is_float(value)}


def _rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def _is(node: ir.Node, operators: Collection[str]) -> bool:
    return node.op_type in operators and node.domain in STANDARD


def _module(node: ir.Node) -> str:
    """The module that an exported node is named after: `layer1.0.conv1` of `layer1.0.conv1/Conv`."""
    return _name(node).rpartition("/")[0]


def _name(thing: ir.Node | ir.Value) -> str:
    return thing.name or ""
