"""The graphs of two artifacts, and what of them can be paired: tensors and nodes that have the same names.

Every stage keeps the names of nodes and values, so that `layer1.0.conv2/Conv` is the same layer in FP32, FP16 and INT8.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes import common

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
    def read(cls, artifact: Artifact, change: Callable[[ir.Model], None] | None = None) -> "Graph":
        """The graph of an artifact; of an engine, that of the typed file that it was built from.

        change: is called with the graph as it is in the file. Raises PrecisionError and ArtifactError.
        """
        model = load_model(artifact.onnx_path)
        if change is not None:
            change(model)
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
    """The tensors that both compute in nodes of the same name and operator, in the order of B.

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
        and (name in outputs or (maker.operator not in _SKIPPED and a.makers[name][:2] == maker[:2]))
    ]


def cut(model: ir.Model, targets: Collection[str], fed: Collection[str]) -> ir.Model:
    """A graph that computes each of `targets` from those of `fed` that are nearest before it, and from nothing before these.

    Its inputs are those of `fed`, and of the graph's inputs, that it needs; its outputs are `targets`, with `LOCAL` behind their
    names. The model is not changed; weights are shared.
    """
    clone = model.clone()
    graph = clone.graph
    values = {value.name: value for node in graph for value in node.outputs if value.name}
    inputs = list(graph.inputs)
    for name in fed:
        value = values[name]
        given = ir.Value(name=name, type=value.type, shape=None)
        for node, index in list(value.uses()):
            node.replace_input_with(index, given)
        inputs.append(given)
    for name in {*targets, *fed}:
        values[name].name = f"{name}{LOCAL}"
    graph.outputs[:] = [values[name] for name in targets]
    graph.inputs.extend(value for value in inputs if value not in graph.inputs)
    common.RemoveUnusedNodesPass()(clone)
    kept = {id(value) for node in graph.all_nodes() for value in node.inputs}
    graph.inputs[:] = [value for value in graph.inputs if id(value) in kept]
    return clone
