"""A torch module to an ONNX graph: torch.export, then PyTorch's ONNX exporter, which folds BatchNorm into convolutions."""

import io
import linecache
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from deploy.errors import ExportError
from deploy.tensors import TensorSpec

_MODULE_KEY = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, kw_only=True)
class ExportedGraph:
    """An ONNX graph with named inputs and outputs and its symbolic dimensions by the names of the specs."""

    model: ir.Model
    torch_outputs: tuple[str, ...]


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
) -> ExportedGraph:
    """Export `module`, called with the tensors of `feed` in the order of `inputs`.

    Symbolic dimensions of `inputs` stay dynamic. `outputs` names the flattened outputs in order. `user_files` are the
    Python files that an error should point into. Raises ExportError, with the module and line in the user's own file
    where there is one.
    """
    dynamic = [{axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in inputs]
    program: torch.export.ExportedProgram | None = None
    with _quiet():
        try:
            args = tuple(feed[spec.name] for spec in inputs)
            shapes = tuple(axes or None for axes in dynamic)
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
            raise ExportError(_explain(error, module, program, inputs, user_files)) from error
    if converted is None:
        raise ExportError("the ONNX exporter returned nothing")
    model: ir.Model = converted.model
    _name_dims(model, inputs)
    _name_nodes(model)
    return ExportedGraph(model=model, torch_outputs=tuple(outputs))


def _name_dims(model: ir.Model, inputs: Sequence[TensorSpec]) -> None:
    """Give symbolic dimensions the names of the specs, wherever torch's own (`s77`) stand, in expressions too."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        for found, dim in zip(value.shape or (), spec.shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and found.value and isinstance(dim, str):
                names[found.value] = dim
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
    """Name every node after the torch module it comes from (`layer1.0.conv1/Conv`), and drop the exporter's notes.

    Reports speak of nodes by name; the notes hold paths of the machine that exported.
    """
    taken: dict[str, int] = {}
    for node in model.graph.all_nodes():
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_MODULE_KEY, ""))
        owner = next((scope for scope in reversed(scopes[:-1]) if scope), "")
        weight = next((value.name for value in node.inputs[1:] if value is not None and value.is_initializer()), None)
        if weight and re.search(r"\.weight(_|$)", weight):  # a Conv that a BatchNorm was folded into bears the latter's scope
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


def _explain(
    error: Exception,
    module: torch.nn.Module,
    program: torch.export.ExportedProgram | None,
    inputs: Sequence[TensorSpec],
    user_files: Sequence[str],
) -> str:
    """One or two lines on why the export failed, with the line and the module in the user's own file."""
    chain = list(_chain(error))
    where = _frame_of(chain, user_files) or (_frame_of_node(chain, program, user_files) if program is not None else None)
    root = chain[-1] if program is None else next((one for one in chain if type(one).__name__ == "DispatchError"), chain[-1])
    reason = _first_sentence(str(root)) or type(root).__name__
    text = " ".join(str(one) for one in chain)
    if "data-dependent" in text:
        reason = f"the control flow depends on the values of a tensor ({reason})"
        remedy = "use torch.where or torch.cond in its place"
    elif "specialized" in text or "Constraints violated" in text:
        dims = ", ".join(sorted({dim for spec in inputs for dim in spec.dynamic}))
        reason = f"the module's code fixes a dimension that should stay dynamic ({dims}): {_constraint(text)}"
        remedy = "compute sizes from x.shape, or export with --static-batch and numbers in --input"
    elif "No ONNX function found" in text:
        operator = re.search(r"op='([^']+)'", text)
        reason = f"the operator {operator[1] if operator else ''} has no ONNX counterpart"
        remedy = "replace it in the module by operators that have one"
    else:
        remedy = "run the module on the same input to see whether it works in eager mode; --debug shows the whole error"
    owner = type(module).__name__
    return f"{owner} cannot be exported{f': {where}' if where else ''}: {reason}\n{remedy}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those it was raised from, outermost first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _frame_of(chain: Sequence[BaseException], user_files: Sequence[str]) -> str | None:
    """The innermost line of the user's own code in the tracebacks, innermost error first, and the module it is in."""
    for error in reversed(chain):
        for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
            path = frame.f_code.co_filename
            if path in user_files:
                inside = frame.f_locals.get("self")
                module = f" of {type(inside).__name__}" if isinstance(inside, torch.nn.Module) else ""
                return f"{path}:{line} in {frame.f_code.co_name}{module}: {linecache.getline(path, line).strip()}"
    return None


def _frame_of_node(
    chain: Sequence[BaseException], program: torch.export.ExportedProgram, user_files: Sequence[str]
) -> str | None:
    """Where the node that an error speaks of was made: torch.export keeps a stack trace and the module path of each."""
    text = " ".join(str(error) for error in chain)
    # Compared without leading underscores: linalg_svd is _linalg_svd once decomposed.
    named = {name.lstrip("_") for name in re.findall(r"node %(\w+)", text)}
    named |= {name.lstrip("_") for name in re.findall(r"(?:op='|torch\.ops\.)aten\.(\w+)", text)}
    for node in program.graph.nodes:
        if named.isdisjoint((node.name, str(node.target).removeprefix("aten.").partition(".")[0])):
            continue
        frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.*)', node.stack_trace or "")
        frames = [frame for frame in frames if frame[0] in user_files] or frames
        owners = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values() if entry[0]]
        if frames:
            path, line, function, code = frames[-1]
            inside = f", module {owners[-1]!r}" if owners else ""
            return f"{path}:{line} in {function}{inside}: {code.strip()}"
    return None


def _first_sentence(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return re.sub(r"\x1b\[[0-9;]*m", "", line)[:300]


def _constraint(text: str) -> str:
    found = re.search(r"(You marked [^\n]+|- Not all values of [^\n]+|[^\n]*specialized[^\n]*)", text)
    return found[1].strip(" -")[:300] if found else _first_sentence(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's log and prints, which repeat what the error says over many lines, off the screen."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
