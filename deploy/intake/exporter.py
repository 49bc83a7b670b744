"""Converts a torch module to an ONNX graph: torch.export, then PyTorch's ONNX exporter, which folds BatchNorm into Conv."""

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx_ir as ir
import torch

from deploy.artifact.tensors import TensorSpec
from deploy.errors import ExportError
from deploy.intake.adaptive_pools import AdaptivePools
from deploy.intake.export_errors import explain, fixed_at, size_branches

logger = logging.getLogger(__name__)

_MODULE_KEY = "pkg.torch.onnx.name_scopes"


def flatten_outputs(result: Any) -> dict[str, torch.Tensor]:
    """Tensors of a module's result by name: a tensor, or nested tuples, lists and dicts of them.

    A lone tensor is `output`, members of a sequence are numbered, those of a dict keep their keys. Raises ExportError
    for anything else.
    """
    if isinstance(result, torch.Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        items = [(str(key), value) for key, value in result.items()]
    elif isinstance(result, (tuple, list)):
        items = [(f"output_{index}", value) for index, value in enumerate(result)]
    else:
        raise ExportError(f"the module returns a {type(result).__name__}; expected tensors, or tuples, lists and dicts of them")
    flat: dict[str, torch.Tensor] = {}
    for key, value in items:
        if isinstance(value, torch.Tensor):
            flat[key] = value
        else:
            flat |= {f"{key}_{name.removeprefix('output_')}": tensor for name, tensor in flatten_outputs(value).items()}
    return flat


def export_graph(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    feed: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    *,
    opset: int | None = None,
    user_files: Sequence[str] = (),
) -> ir.Model:
    """Export `module`, called with the tensors of `feed` in the order of `inputs`.

    Symbolic dimensions of `inputs` stay dynamic. `outputs` names the flattened outputs in order. `user_files` are the
    Python files that an error should point into. Raises ExportError, with the module and the line in the user's file if it is
    known. Logs a warning if the user's code branches on a size, because the graph has only one side of the branch.
    """
    dynamic = [{axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in inputs]
    args = tuple(feed[spec.name] for spec in inputs)
    shapes = tuple(axes or None for axes in dynamic)
    program: torch.export.ExportedProgram | None = None
    with _quiet():
        try:
            with AdaptivePools():
                program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
            converted = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[spec.name for spec in inputs],
                output_names=list(outputs),
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:  # the exporter lets errors of every kind through
            line = fixed_at(module, args, shapes, user_files) if program is None else None
            raise ExportError(explain(error, module, program, inputs, user_files, line)) from error
    if converted is None:
        raise ExportError("the ONNX exporter returned nothing")
    for branch in size_branches(program, inputs, user_files):
        logger.warning("%s", branch)
    model: ir.Model = converted.model
    _name_dims(model, inputs)
    _name_nodes(model)
    return model


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
    """Name every node after its torch module (`layer1.0.conv1/Conv`), and delete the exporter's metadata.

    Reports name nodes. The metadata contains paths of the machine that exported.
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
        node.metadata_props.clear()
    for value in {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's log and prints, which repeat the error over many lines."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
