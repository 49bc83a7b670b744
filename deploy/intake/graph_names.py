"""Names in an exported graph: inputs, outputs and dimensions are called as the user calls them, nodes after their modules."""

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import onnx_ir as ir
import torch

from deploy.artifact.onnxfile import SOURCE_LINE
from deploy.artifact.tensors import TensorSpec

_MODULE_KEY = "pkg.torch.onnx.name_scopes"
_STACK_KEY = "pkg.torch.onnx.stack_trace"
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = str(Path(torch.__file__).parent)


def name_graph(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> None:
    """Name the inputs, outputs, dimensions and nodes of `model`, and delete the exporter's metadata.

    inputs, outputs: in the order of the graph's. A value inside that has the name of one of them gets another.
    """
    _name_dims(model, inputs)
    _name_values(model, [spec.name for spec in inputs], outputs)
    _name_nodes(model)


def _name_values(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the inputs and outputs their names, and another one to the values inside that have one of these.

    An output that is an input, a weight or another output too is copied.
    """
    graph = model.graph
    for index, value in enumerate(graph.outputs):
        if value.is_graph_input() or value.is_initializer() or value in graph.outputs[:index]:
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
    ends = [*graph.inputs, *graph.outputs]
    names = [*inputs, *outputs]
    inside = [value for part in model.graphs() for value in _values(part) if not any(value is end for end in ends)]
    taken = {value.name for value in inside} | set(names)
    for value in inside:
        if value.name in names:
            value.name = next(free for n in count(2) if (free := f"{value.name}_{n}") not in taken)
            taken.add(value.name)
    for value, name in zip(ends, names, strict=True):
        value.name = name


def _name_dims(model: ir.Model, inputs: Sequence[TensorSpec]) -> None:
    """Replace torch's names of symbolic dimensions (`s77`) by those of the specs, also inside expressions."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        for symbol, dim in zip(value.shape or (), spec.shape, strict=True):
            if isinstance(symbol, ir.SymbolicDim) and symbol.value and isinstance(dim, str):
                names[symbol.value] = dim
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in {*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph.all_nodes() for out in node.outputs)}:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    ir.SymbolicDim(pattern.sub(lambda match: names[match[1]], dim.value))
                    if isinstance(dim, ir.SymbolicDim) and dim.value
                    else dim
                    for dim in value.shape
                ]
            )


def _name_nodes(model: ir.Model) -> None:
    """Name every node after its torch module (`layer1.0.conv1/Conv`), and delete the exporter's metadata but for the line of code.

    Reports name nodes. The metadata contains paths of the machine that exported; of a line, the name of its file is kept.
    """
    taken: dict[str, int] = {}
    for node in model.graph.all_nodes():
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_MODULE_KEY, ""))
        owner = next((scope for scope in reversed(scopes[:-1]) if scope), "")
        weight = next((value.name for value in node.inputs[1:] if value is not None and value.is_initializer()), None)
        if weight and re.search(r"\.weight(_|$)", weight):  # a Conv with a folded BatchNorm has the scope of the BatchNorm
            owner = weight[: weight.rindex(".weight")]
        name = f"{owner}/{node.op_type}" if owner else node.op_type
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        lines = [
            (file, line) for file, line in _FRAME.findall(node.metadata_props.get(_STACK_KEY, "")) if not file.startswith(_TORCH)
        ]
        node.metadata_props.clear()
        if lines:
            node.metadata_props[SOURCE_LINE] = f"{Path(lines[-1][0]).name}:{lines[-1][1]}"
    for value in {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
