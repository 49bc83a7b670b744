"""The graphs of two artifacts, and what of them can be paired: tensors and nodes that have the same names.

Every stage keeps the names of nodes and values, so that `layer1.0.conv2/Conv` is the same layer in FP32, FP16 and INT8.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import SOURCE_LINE, load_model
from deploy.errors import UsageError
from deploy.precision.half.emulate import Emulate
from deploy.precision.prepare import Prepare

LOCAL = ":computed"
"""Behind the name of an output of `cut`: the tensor as it is computed there, beside the one that is fed."""

_KIN = 0.5
"""The share of the smaller graph's nodes that must be in the other, by name and operator."""

_HALVES = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_SKIPPED = ("QuantizeLinear", "DequantizeLinear", "Cast")


class Maker(NamedTuple):
    """A node: its name, its operator, and the line of the model's code that it comes from, where the file says so."""

    name: str
    operator: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The ONNX file of an artifact, ready to run on the CPU as it computes: half precision is emulated.

    makers: the node that computes each tensor of the main graph, by the tensor's name, in order.
    halves: the precision of the tensors that are stored in half precision, by name.
    """

    artifact: Artifact
    model: ir.Model
    makers: Mapping[str, Maker]
    halves: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, artifact: Artifact) -> "Graph":
        """The graph of an artifact; of an engine, that of the typed file that it was built from.

        Raises PrecisionError and ArtifactError.
        """
        model = load_model(artifact.onnx_path)
        Prepare()(model)
        makers = {
            value.name: Maker(node.name or "", node.op_type, node.metadata_props.get(SOURCE_LINE, ""))
            for node in model.graph
            for value in node.outputs
            if value.name
        }
        values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
        halves = {value.name or "": _HALVES[value.dtype] for value in values if value.dtype in _HALVES}
        for value in model.graph.outputs:  # an FP32 output of a network in half precision is a Cast of what was rounded
            cast = value.producer()
            if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None and cast.inputs[0].name in halves:
                halves[value.name or ""] = halves[cast.inputs[0].name]
        if halves or any(value.dtype in _HALVES for value in model.graph.initializers.values()):
            Emulate()(model)
        return cls(artifact=artifact, model=model, makers=makers, halves=halves)

    def values(self) -> dict[str, ir.Value]:
        """What the nodes of the main graph compute, by name, in order."""
        return {value.name: value for node in self.model.graph for value in node.outputs if value.name}


def paired(a: Graph, b: Graph) -> list[str]:
    """The tensors that both compute in nodes of the same name, in the order of B.

    Raises UsageError where the two are not of one network.
    """
    for what in ("inputs", "outputs"):
        names, others = ([value.name for value in getattr(graph.model.graph, what)] for graph in (a, b))
        if set(names) != set(others):
            raise UsageError(
                f"{a.artifact.shown} and {b.artifact.shown} are not of one network: the {what} are {', '.join(map(str, names))},"
                f" and {', '.join(map(str, others))}"
            )
    ours, theirs = ({maker[:2] for maker in graph.makers.values()} for graph in (a, b))
    least = min(len(ours), len(theirs))
    if len(ours & theirs) < _KIN * least:
        raise UsageError(
            f"{a.artifact.shown} and {b.artifact.shown} are not of one network: {len(ours & theirs)} of {least} nodes have the same"
            " name and operator; give two artifacts that were made from one export"
        )
    known = {value.name: value for value in a.values().values() if value.dtype is not None}
    types = {value.name: value.dtype for value in b.values().values()}
    outputs = {value.name for value in b.model.graph.outputs}  # in half precision, a Cast makes them
    return [
        name
        for name, maker in b.makers.items()
        if name in known
        and known[name].dtype == types[name]
        and (name in outputs or (maker.operator not in _SKIPPED and a.makers[name].name == maker.name))
    ]


def dequantized(node: ir.Node, index: int) -> ir.Node | None:
    """The DequantizeLinear before an input of a node of B, past what only moves or scales; None where there is none."""
    value = node.inputs[index] if index < len(node.inputs) else None
    maker = None if value is None else value.producer()
    while maker is not None and maker.op_type in ("Cast", "Transpose", "Reshape"):
        value = maker.inputs[0]
        maker = None if value is None else value.producer()
    return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def unlike_pairs(graph: Graph) -> set[str]:
    """What nodes compute from a tensor that is quantized with one scale or zero point and read back with another."""
    found: set[str] = set()
    for node in graph.model.graph:
        for value in node.inputs:
            back = None if value is None else value.producer()
            codes = back.inputs[0] if back is not None and back.op_type == "DequantizeLinear" else None
            there = None if codes is None else codes.producer()
            if back is None or there is None or there.op_type != "QuantizeLinear":
                continue
            pairs = zip_longest(there.inputs[1:], back.inputs[1:])
            if not all(_same_constant(one, other) for one, other in pairs):
                found |= {output.name for output in node.outputs if output.name}
    return found


def _same_constant(one: ir.Value | None, other: ir.Value | None) -> bool:
    if one is other:
        return True
    arrays = [
        np.zeros(1) if value is None else value.const_value.numpy() if value.const_value is not None else None
        for value in (one, other)
    ]
    return arrays[0] is None or arrays[1] is None or bool(np.all(arrays[0].astype(np.float64) == arrays[1].astype(np.float64)))


def cut(model: ir.Model, targets: Collection[str], fed: Collection[str]) -> ir.Model:
    """A graph that computes each of `targets` from those of `fed` that are nearest before it, and from nothing before these.

    Its inputs are those of `fed`, and of the graph's inputs, that it needs; its outputs are `targets`, with `LOCAL` behind their
    names. The model is not changed; weights are shared. It takes time for what is cut out, not for the whole.
    """
    values = {value.name: value for node in model.graph for value in node.outputs if value.name}
    given = {values[name] for name in fed}
    wanted = [values[name] for name in targets]
    nodes, weights, bounds = _between(model.graph, wanted, given)
    view = ir.GraphView(
        bounds, wanted, nodes=nodes, initializers=weights, opset_imports=model.graph.opset_imports, name=model.graph.name
    )
    graph = view.clone()
    own = {value.name: value for node in graph for value in node.outputs}
    for value in graph.inputs:
        if value.name in values:
            value.shape = None
    for value in (values[name] for name in fed if name in own):
        own[value.name].name = f"{value.name}{LOCAL}"
        readers = list(own[value.name].uses())
        if readers:
            again = ir.Value(name=value.name, type=value.type, shape=None)
            for node, index in readers:
                node.replace_input_with(index, again)
            graph.inputs.append(again)
    for name in targets:
        own[name].name = f"{name}{LOCAL}"
    return ir.Model(graph, ir_version=model.ir_version)


def _between(
    graph: ir.Graph, wanted: Sequence[ir.Value], given: Collection[ir.Value]
) -> tuple[list[ir.Node], list[ir.Value], list[ir.Value]]:
    """The nodes that compute `wanted` from `given`, in the order of the graph; the weights and the other values that they read."""
    nodes: set[ir.Node] = set()
    weights: dict[ir.Value, None] = {}
    bounds: dict[ir.Value, None] = {}
    pending = [node for value in wanted if (node := value.producer()) is not None]
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for value in reads(node):
            maker = value.producer()
            if value.is_initializer():
                weights[value] = None
            elif maker is None or value in given:
                bounds[value] = None
            else:
                pending.append(maker)
    made = {value for node in nodes for value in node.outputs}
    return [node for node in graph if node in nodes], list(weights), [value for value in bounds if value not in made]


def reads(node: ir.Node) -> list[ir.Value]:
    """What a node of the main graph, and the graphs inside it, read of the main graph."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            read = [*inner.outputs, *(value for each in inner.all_nodes() for value in each.inputs if value is not None)]
            found += [value for value in read if value.graph is node.graph]
    return found
