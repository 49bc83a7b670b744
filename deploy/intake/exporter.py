"""Converts a torch module to an ONNX graph: torch.export, then PyTorch's ONNX exporter, which folds BatchNorm into Conv."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import count
from typing import Any

import onnx_ir as ir
import torch
from torch.utils._pytree import tree_leaves, tree_unflatten

from deploy.artifact.tensors import TensorSpec
from deploy.errors import ExportError
from deploy.intake.adaptive_pools import AdaptivePools
from deploy.intake.attribute_names import any_attribute_name
from deploy.intake.call import bind, dynamic_shapes
from deploy.intake.export_errors import explain, fixed_at, size_branches
from deploy.intake.graph_names import name_graph
from deploy.intake.recurrent import RecurrentLayers, fold_weights
from deploy.words import a_type

logger = logging.getLogger(__name__)


def flatten_outputs(result: Any) -> dict[str, torch.Tensor]:
    """Tensors of a module's result by name: a tensor, or nested tuples, lists and dicts of them. None among them is left out.

    A lone tensor is `output`, members of a sequence are numbered, those of a dict keep their keys, or are numbered where
    that is empty. Where a member of a member
    would be called as another output, a number is appended. Raises ExportError for anything else, and for no tensor at all.
    """
    flat = named_leaves(result)
    for name, value in flat.items():
        if value is not None and not isinstance(value, torch.Tensor):
            place = "" if value is result else f" as {name!r}"
            raise ExportError(f"the module returns {a_type(value)}{place}; expected tensors, or tuples, lists and dicts of them")
    tensors = {name: value for name, value in flat.items() if value is not None}
    if not tensors:
        raise ExportError(f"the module returns no tensor{' but None' if flat else ''}; expected one at least")
    return tensors


def named_leaves(result: Any) -> dict[str, Any]:
    """What is in the nested tuples, lists and dicts of `result`, by the names of `flatten_outputs`."""
    members = _members(result)
    if members is None:
        return {"output": result}
    own = {key for key, member in members if _members(member) is None}
    flat: dict[str, Any] = {}
    for key, member in members:
        for inner, leaf in named_leaves(member).items():
            whole = _members(member) is None
            name = key if whole else f"{key}_{inner.removeprefix('output_')}"
            taken = name in flat or (name in own and not whole)
            flat[next(free for n in count(2) if (free := f"{name}_{n}") not in {*flat, *own}) if taken else name] = leaf
    return flat


def _members(value: Any) -> list[tuple[str, Any]] | None:
    """The members of a dict or a sequence, by key or number; None for anything else."""
    if isinstance(value, Mapping):
        return [(str(key) or f"output_{index}", member) for index, (key, member) in enumerate(value.items())]
    if isinstance(value, (tuple, list)):
        return [(f"output_{index}", member) for index, member in enumerate(value)]
    return None


def export_graph(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    feed: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    *,
    opset: int | None = None,
    user_files: Sequence[str] = (),
) -> ir.Model:
    """Export `module`, called with the tensors of `feed` as `deploy.intake.call.bind` says.

    Symbolic dimensions of `inputs` stay dynamic. `outputs` names the flattened outputs in order. `user_files` are the
    Python files that an error should point into. Raises ExportError, with the module and the line in the user's file if it is
    known, and UsageError where `module` does not take these inputs. Logs a warning if the user's code branches on a size,
    because the graph has only one side of the branch, and for an output that is None.
    """
    args, kwargs = bind(module, {spec.name: feed[spec.name] for spec in inputs})
    shapes = dynamic_shapes(module, inputs)
    program: torch.export.ExportedProgram | None = None
    with quiet(), any_attribute_name():
        try:
            with AdaptivePools(), RecurrentLayers():
                program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
            converted = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
        except Exception as error:  # the exporter lets errors of every kind through
            line = fixed_at(module, args, kwargs, shapes, user_files) if program is None else None
            raise ExportError(explain(error, module, program, inputs, (args, kwargs), user_files, line)) from error
    if converted is None:
        raise ExportError("the ONNX exporter returned nothing")
    results = tree_unflatten(list(program.graph_signature.user_outputs), program.call_spec.out_spec)
    for name in [name for name, value in named_leaves(results).items() if value is None]:
        logger.warning("%s is None, and is left out", name)
    model: ir.Model = converted.model
    fold_weights(model)
    passed: list[TensorSpec] = tree_leaves(bind(module, {spec.name: spec for spec in inputs}))  # in the order of the parameters
    for branch in size_branches(program, passed, user_files):
        logger.warning("%s", branch)
    name_graph(model, passed, outputs)
    model.graph.inputs[:] = [model.graph.inputs[passed.index(spec)] for spec in inputs]
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the exporter's log and prints, which repeat the error over many lines."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            # Of recurrent layers, which keep their weights in a list too.
            warnings.filterwarnings("ignore", r"The tensor attributes? self\..*_flat_weights", UserWarning)
            yield
    finally:
        logging.disable(previous)
