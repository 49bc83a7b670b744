"""The units of a network: layers that are INT8 or in floating point together, and the tensors that cross between units."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from deploy.artifact.onnxshapes import with_sizes
from deploy.precision.graph import STANDARD
from deploy.precision.int8.branches import branched_nodes
from deploy.precision.int8.placement import Placement
from deploy.precision.int8.rules import WEIGHTED
from deploy.precision.macs import count_in_branches, count_macs

_IN_FLOAT = frozenset(
    (
        "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "Pow", "RMSNormalization", "ReduceMax", "ReduceMean",
        "ReduceSum", "Softmax", "Sqrt", "Sub",
    )
)  # fmt: skip
"""Operators that no backend computes on codes: behind them, and behind a sum that is not quantized, nothing is converted."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Quantized nodes that stay together, by name in the order of the graph.

    name: the module of the first layer with weights. macs: its share of the multiply-accumulates of all units, 0 to 1.
    """

    name: str
    nodes: tuple[str, ...]
    macs: float


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A tensor that one unit makes and another reads: it is converted where they have different labels.

    units: the places of the two. elements: the numbers in the tensor.
    """

    units: tuple[int, int]
    elements: int


def units_of(
    model: ir.Model, placement: Placement, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[Unit, ...], tuple[Crossing, ...]]:
    """The units of a prepared FP32 model, in the order of the graph, and the tensors between them.

    placement: with everything quantized that can be. shapes: of the inputs. Together are: a layer, its activation, which has no pair
    of its own, and the sum that is computed in it; pools and Concat with what makes their input; tensors of a shared scale; and the layers
    around the products of attention.
    """
    nodes = {node.name or "": node for node in branched_nodes(model.graph)}
    readers = {node for uses in placement.edges.values() for node, _ in uses}
    quantized = [name for name in nodes if name in readers or name in placement.nodes]
    weighted = set(placement.nodes)
    ties = _Ties(quantized)
    for node in (nodes[name] for name in quantized if name not in weighted):
        skips = {index for uses in placement.edges.values() for reader, index in uses if reader == node.name}
        own = [value for index, value in enumerate(node.inputs) if node.op_type != "Add" or index not in skips]
        ties.tie([node.name or "", *_makers(own, ties)])
    for group in placement.groups:
        ties.tie([node for tensor in group for node, _ in placement.edges[tensor]])
    for node in nodes.values():
        if _attends(node):
            around = [*_makers(node.inputs, ties), *_readers(node.outputs, ties)]
            ties.tie([*around, *([node.name] if node.name in ties.known else [])])
    sets = _with_weights(ties.sets(), weighted)
    macs = count_macs(model, shapes) | count_in_branches(model, shapes)
    counts = [sum(macs.get(name) or 0 for name in members) for members in sets]
    total = sum(counts) or 1
    names = _names([[name for name in members if name in weighted] or members for members in sets])
    units = tuple(
        Unit(name=name, nodes=tuple(members), macs=count / total)
        for name, members, count in zip(names, sets, counts, strict=True)
    )
    return units, _crossings(model, units, placement, nodes, shapes)


def _crossings(
    model: ir.Model,
    units: tuple[Unit, ...],
    placement: Placement,
    nodes: Mapping[str, ir.Node],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Crossing, ...]:
    owner = {node: place for place, unit in enumerate(units) for node in unit.nodes}
    sizes = _sizes(model, shapes)
    found: dict[tuple[str, int, int], None] = {}
    for tensor, uses in placement.edges.items():
        for node, index in uses:
            for maker in _makers([nodes[node].inputs[index]], owner, through=lambda between: not _in_float(between)):
                if owner[maker] != owner[node]:
                    found[tensor, owner[maker], owner[node]] = None
    return tuple(Crossing(units=(maker, reader), elements=sizes.get(tensor, 0)) for tensor, maker, reader in found)


def _sizes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The elements of every tensor whose shape follows from those of the inputs."""
    fixed = with_sizes(model, shapes)
    values = (value for node in branched_nodes(fixed.graph) for value in node.outputs)
    return {
        value.name or "": math.prod(value.shape.numpy())
        for value in values
        if value.shape is not None and value.shape.is_static()
    }


class _Ties:
    """Sets of names, joined by `tie`; in the order in which the names were given."""

    def __init__(self, names: Iterable[str]) -> None:
        self.known = {name: [name] for name in names}

    def __contains__(self, name: object) -> bool:
        return name in self.known

    def tie(self, names: Iterable[str]) -> None:
        whole: list[str] = []
        for name in names:
            if self.known[name] is not whole:
                whole += [each for each in self.known[name] if each not in whole]
                for each in self.known[name]:
                    self.known[each] = whole

    def sets(self) -> list[list[str]]:
        order = {name: place for place, name in enumerate(self.known)}
        unique = {id(members): sorted(members, key=order.__getitem__) for members in self.known.values()}
        return sorted(unique.values(), key=lambda members: order[members[0]])


def _with_weights(sets: list[list[str]], weighted: set[str]) -> list[list[str]]:
    """`sets` in which those without a layer with weights have joined the one before, or the first that has one."""
    found: list[list[str]] = []
    waiting: list[str] = []
    for members in sets:
        if weighted.isdisjoint(members):
            (found[-1] if found else waiting).extend(members)
        else:
            found.append([*waiting, *members])
            waiting = []
    return found


def _names(sets: list[list[str]]) -> list[str]:
    """The module of each first node, or its own name where two would have the same."""
    modules = [members[0].rpartition("/")[0] or members[0] for members in sets]
    return [module if modules.count(module) == 1 else members[0] for module, members in zip(modules, sets, strict=True)]


def _makers(
    values: Iterable[ir.Value | None], known: "_Ties | Mapping[str, int]", through: Callable[[ir.Node], bool] = lambda node: True
) -> list[str]:
    """The nearest known nodes before `values`, through nodes that are not known, have no weights, and are `through`."""
    return _nearest(
        [value.producer() for value in values if value is not None],
        known,
        lambda node: [value.producer() for value in node.inputs if value is not None] if through(node) else [],
    )


def _readers(values: Iterable[ir.Value], known: _Ties) -> list[str]:
    """The nearest known nodes after `values`."""
    return _nearest(
        [user for value in values for user, _ in value.uses()],
        known,
        lambda node: [user for value in node.outputs for user, _ in value.uses()],
    )


def _nearest(
    first: list[ir.Node | None], known: "_Ties | Mapping[str, int]", further: Callable[[ir.Node], list[ir.Node | None]]
) -> list[str]:
    pending, seen, found = list(first), set[ir.Node](), dict[str, None]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name in known:
            found[node.name or ""] = None
        elif not (_is_product(node) and not _attends(node)):
            pending += further(node)
    return list(found)


def _is_product(node: ir.Node) -> bool:
    return node.op_type in WEIGHTED and node.domain in STANDARD


def _in_float(node: ir.Node) -> bool:
    """Whether a node that is not quantized computes in floating point whatever is before and behind it."""
    operands = [value for value in node.inputs if value is not None and not _constant(value)]
    return node.op_type in _IN_FLOAT or (node.op_type == "Add" and len(operands) > 1)


def _attends(node: ir.Node) -> bool:
    """Whether `node` multiplies two activations."""
    return _is_product(node) and node.op_type == "MatMul" and not any(value is None or _constant(value) for value in node.inputs)


def _constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")
