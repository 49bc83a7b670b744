"""Layers in the branches of If: a feed runs one branch, so that the tensors of the other are not there for it."""

from collections.abc import Collection, Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import PassResult
from onnx_ir.passes.common import LiftSubgraphInitializersToMainGraphPass

from deploy.artifact.onnxshapes import slim_proto
from deploy.precision.graph import STANDARD, unused
from deploy.precision.passes import PREPARED, VALID, Condition, PrecisionPass


def branches(node: ir.Node) -> list[ir.Graph]:
    """The two branches of an If, none of any other node: the bodies of loops run many times for one feed."""
    if node.op_type != "If" or node.domain not in STANDARD:
        return []
    return [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]


def branched_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of the branches in it, in an order of computation: those of branches before their If."""
    for node in graph:
        for branch in branches(node):
            yield from branched_nodes(branch)
        yield node


def reads(node: ir.Node) -> list[ir.Value | None]:
    """What a node makes its outputs of: its inputs, and the results of its branches."""
    return [*node.inputs, *(value for branch in branches(node) for value in branch.outputs)]


def _shared(model: ir.Model) -> str:
    seen: set[str | None] = set()
    for graph in model.graphs():
        if graph is not model.graph and any(not value.is_graph_output() for value in graph.initializers.values()):
            return f"{graph.name!r} has initializers of its own"
        for value in (*graph.initializers.values(), *(value for node in graph for value in node.outputs if value.name)):
            if value.name in seen:
                return f"two values are called {value.name!r}"
            seen.add(value.name)
    return ""


ONE_SCOPE = Condition("subgraphs share the initializers of the main graph, and no two values have one name", _shared)


class ShareScope(PrecisionPass):
    """The same computation with the weights of subgraphs in the main graph, and a name of its own for every value in them.

    Dtypes and shapes in subgraphs are recorded as far as they follow.
    """

    needs = PREPARED
    leaves = (*PREPARED, ONE_SCOPE, VALID)

    def call(self, model: ir.Model) -> PassResult:
        inner = [graph for graph in model.graphs() if graph is not model.graph]
        if not inner:
            return PassResult(model, False)
        outer = [value for node in model.graph for value in node.outputs]
        taken = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values(), *outer)}
        for graph in inner:
            made = (value for node in graph for value in node.outputs)
            for value in (*graph.inputs, *graph.initializers.values(), *made):
                if value.name:
                    value.name = unused(value.name, taken)
                    taken.add(value.name)
        LiftSubgraphInitializersToMainGraphPass()(model)
        _record_types(model, inner)
        return PassResult(model, True)


def _record_types(model: ir.Model, graphs: Collection[ir.Graph]) -> None:
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(slim_proto(model), data_prop=True))
    found = {value.name: value for graph in inferred.graphs() for node in graph for value in node.outputs}
    for value in (value for graph in graphs for node in graph for value in node.outputs):
        if value.name in found:
            value.type = value.type or found[value.name].type
            value.shape = value.shape or found[value.name].shape


def with_outputs(model: ir.Model, tensors: Collection[str]) -> tuple[ir.Model, dict[str, str]]:
    """A copy of `model`, of one scope, with float tensors of branches as tensors of the main graph, and their names there.

    Where the other branch ran, such a tensor is empty, of shape (0,). Tensors that are in no branch have no such name.
    """
    copy = model.clone()
    taken = {value.name for graph in copy.graphs() for node in graph for value in node.outputs}
    taken |= {value.name for value in (*copy.graph.inputs, *copy.graph.initializers.values())}
    shown: dict[str, str] = {}
    _pass_out(copy.graph, frozenset(tensors), taken, shown)
    own = {value.name for node in copy.graph for value in node.outputs}
    return copy, {tensor: name for tensor, name in shown.items() if name in own and name != tensor}


def _pass_out(graph: ir.Graph, tensors: frozenset[str], taken: set[str | None], shown: dict[str, str]) -> list[str]:
    """Make outputs of the Ifs of `graph` of all the tensors in their branches; returns those that are in `graph` then."""
    here = [name for node in graph for value in node.outputs if (name := value.name or "") in tensors]
    shown.update({name: name for name in here})
    for node in list(graph):
        both = branches(node)
        found = [_pass_out(branch, tensors, taken, shown) for branch in both]
        for index, names in enumerate(found):
            for name in names:
                for place, branch in enumerate(both):
                    _append_output(branch, shown[name] if place == index else None, taken)
                node.resize_outputs(len(node.outputs) + 1)
                output = node.outputs[-1]
                output.name, output.type = _claim(f"{name}_seen", taken), ir.TensorType(ir.DataType.FLOAT)
                here.append(name)
                shown[name] = output.name
    return here


def _append_output(graph: ir.Graph, name: str | None, taken: set[str | None]) -> None:
    """Make the value called `name`, or an empty tensor in its place, a further output of a branch."""
    if name is None:
        empty = ir.AttrTensor("value", ir.tensor(np.zeros(0, np.float32)))
        node = ir.Node("", "Constant", [], [empty], num_outputs=1)
    else:
        source = next(value for inner in graph for value in inner.outputs if value.name == name)
        node = ir.Node("", "Identity", [source], num_outputs=1)
    node.name = node.outputs[0].name = _claim("branch_output", taken)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.append(node.outputs[0])


def _claim(name: str, taken: set[str | None]) -> str:
    name = unused(name, taken)
    taken.add(name)
    return name
