"""Explains why a module cannot be exported, with the line of the user's code that prevents it."""

import linecache
import re
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from deploy.artifact.tensors import TensorSpec, batch_dim
from deploy.errors import ExportError
from deploy.intake.adaptive_pools import AdaptivePools
from deploy.intake.call import bind, bound
from deploy.intake.recurrent import RecurrentLayers


def explain(
    error: Exception,
    module: torch.nn.Module,
    program: torch.export.ExportedProgram | None,
    inputs: Sequence[TensorSpec],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    user_files: Sequence[str],
    fixed: str | None,
) -> str:
    """Two lines about a failed export: the place in the user's file, if it is known, with the reason; and what to do.

    program: the result of torch.export, None if torch.export itself failed. arguments: of `module`. fixed: the line that `fixed_at` returned.
    """
    chain = list(_chain(error))
    where = line_of(error, user_files) or (_line_of_node(chain, program, user_files) if program is not None else None)
    root = chain[-1] if program is None else next((one for one in chain if type(one).__name__ == "DispatchError"), chain[-1])
    reason = _first_line(str(root)) or type(root).__name__
    text = " ".join(str(one) for one in chain)
    if program is None and (script := _script_called(module, *arguments)) is not None:
        reason = f"{f'it calls {script!r}, which' if script else 'it'} is a TorchScript module (torch.jit.script, trace or load)"
        remedy = "make it of the plain torch.nn.Module, before torch.jit"
    elif program is None and (name := _unregistered(module)) is not None:
        reason = f"it holds {name!r}, a name that torch lets no part be registered by, and torch.export cannot reach it"
        remedy = "rename it: no dot, no empty name and no name of the module's own attributes"
    elif isinstance(root, ExportError):  # ours, from within the trace
        reason, _, remedy = str(root).partition("\n")
    elif "data-dependent" in text:
        reason = f"the control flow depends on the values of a tensor ({reason})"
        remedy = "use torch.where or torch.cond in its place"
    elif "specialized" in text or "Constraints violated" in text:
        where = fixed or where
        reason, remedy = fixed_reason(_fixed_dims(text, module, inputs), static=_exports_static(module, inputs, arguments))
    elif "No ONNX function found" in text:
        operator = re.search(r"op='([^']+)'", text)
        reason = f"the operator {operator[1] if operator else ''} has no ONNX counterpart"
        remedy = "replace it in the module by operators that have one"
    elif "numpy() is not supported" in text:
        reason = f"it computes in numpy, which torch.export cannot follow ({reason})"
        remedy = "use torch's own functions in its place"
    else:
        remedy = "--debug shows the whole error"  # the module itself was run on such input before
    return f"{type(module).__name__} cannot be exported{f': {where}' if where else ''}: {reason}\n{remedy}"


def fixed_reason(dims: Sequence[str], *, static: bool) -> tuple[str, str]:
    """The reason and the remedy in the error for a module that works with only one size of `dims`; `static`: and that it does."""
    noun, names = ("dimension", "dimensions")[len(dims) > 1], ", ".join(repr(dim) for dim in dims)
    return (
        f"the module's code fixes the {noun} {names} that should stay dynamic",
        "compute with x.shape as it is (no int(), loop or fixed number)"
        + (", or export with `static_batch` and numbers in `inputs`" if static else ""),
    )


def _exports_static(
    module: torch.nn.Module, inputs: Sequence[TensorSpec], arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> bool:
    """Whether `module` can be exported with one row, where nothing is dynamic."""
    batch = batch_dim(inputs)
    specs = tree_leaves(bind(module, {spec.name: spec for spec in inputs}))
    leaves, structure = tree_flatten(arguments)
    rows = [
        leaf.narrow(spec.shape.index(batch), 0, 1) if batch in spec.shape else leaf
        for spec, leaf in zip(specs, leaves, strict=True)
    ]
    args, kwargs = tree_unflatten(rows, structure)
    try:
        with AdaptivePools(), RecurrentLayers():
            torch.export.export(module, args, kwargs, strict=False)
    except Exception:  # as many kinds as that which is being explained
        return False
    return True


def _unregistered(module: torch.nn.Module) -> str | None:
    """A part that was put under a name which `register_module`, `register_parameter` and `register_buffer` refuse."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for name in (*owner._modules, *owner._parameters, *owner._buffers):
            if not name or "." in name or hasattr(type(owner), name):
                return f"{path}.{name}" if path else name
    return None


def _script_called(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The first TorchScript module that `module` calls, "" for itself, None where it calls none: torch.export cannot look into it."""
    names = {inner: name for name, inner in module.named_modules() if isinstance(inner, torch.jit.ScriptModule)}
    called: list[str] = []
    if not names:
        return None

    def look(inner: torch.nn.Module, args: object) -> None:
        called.extend([names[inner]] if inner in names else [])

    handle = register_module_forward_pre_hook(look)
    try:
        module(*args, **kwargs)
    except Exception:  # noqa: S110  # the export failed before; what was called until then is known
        pass
    finally:
        handle.remove()
    return next(iter(called), None)


def line_of(error: BaseException, user_files: Sequence[str]) -> str | None:
    """The innermost line of the user's own code in the tracebacks, innermost error first, and the module it is in."""
    for one in reversed(list(_chain(error))):
        for frame, line in reversed(list(traceback.walk_tb(one.__traceback__))):
            if frame.f_code.co_filename in user_files:
                return _place(frame, line)
    return None


def fixed_at(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: dict[str, Any], user_files: Sequence[str]
) -> str | None:
    """The line of the user's code at which torch.export first makes a number of a dynamic dimension; None if it never does.

    torch's error names the dimension but not the line, so the export that failed runs a second time and is observed.
    """
    lines: list[str] = []
    replace = ShapeEnv._set_replacement

    def watched(self: ShapeEnv, symbol: Any, target: Any, message: str) -> None:
        if target.is_number and str(symbol).startswith("s"):  # `u0` is a size that depends on data
            frames = ((frame, line) for frame, line in traceback.walk_stack(None) if frame.f_code.co_filename in user_files)
            lines.extend(_place(frame, line) for frame, line in list(frames)[:1])
        replace(self, symbol, target, message)

    setattr(ShapeEnv, "_set_replacement", watched)  # noqa: B010  # mypy forbids to assign a method
    try:
        with AdaptivePools(), RecurrentLayers():
            torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception:  # noqa: S110  # the error that is being explained
        pass
    finally:
        setattr(ShapeEnv, "_set_replacement", replace)  # noqa: B010  # as above
    return next(iter(lines), None)


def size_branches(program: torch.export.ExportedProgram, inputs: Sequence[TensorSpec], user_files: Sequence[str]) -> list[str]:
    """Warnings about the lines of the user's code that branch on a size: the graph has only the branch that was taken."""
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    values = [nodes[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    names = {
        str(size): dim
        for value, spec in zip(values, inputs, strict=False)
        if isinstance(value, torch.Tensor)
        for size, dim in zip(value.shape, spec.shape, strict=True)
        if isinstance(dim, str)
    }
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)
    warnings = []
    for guard in mode.shape_env.guards if mode is not None and mode.shape_env is not None else ():
        frame = guard.sloc.framework_loc  # where the size was read: in torch, unless the user's code compares it
        if frame is not None and frame.filename in user_files:
            rule = f"{guard.expr.lhs} {guard.expr.rel_op} {guard.expr.rhs}" if guard.expr.is_Relational else str(guard.expr)
            rule = re.sub(r"\bs\d+\b", lambda match: names.get(match[0], match[0]), rule)
            warnings.append(
                f"{frame.filename}:{frame.lineno} in {frame.name}: {(frame.line or '').rstrip(':')}: the module branches on a size, and the graph holds"
                f" one branch: it is right only where {rule}"
            )
    return list(dict.fromkeys(warnings))


def _place(frame: FrameType, line: int) -> str:
    path, inside = frame.f_code.co_filename, frame.f_locals.get("self")
    module = f" of {type(inside).__name__}" if isinstance(inside, torch.nn.Module) else ""
    return f"{path}:{line} in {frame.f_code.co_name}{module}: {linecache.getline(path, line).strip().rstrip(':')}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _line_of_node(chain: Sequence[BaseException], program: torch.export.ExportedProgram, user_files: Sequence[str]) -> str | None:
    """The line that made the node which an error names: torch.export keeps a stack trace and a module path for every node."""
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


def _fixed_dims(text: str, module: torch.nn.Module, inputs: Sequence[TensorSpec]) -> list[str]:
    """The dimensions in torch's complaint, by their names in the specs; all dynamic ones if it names none."""
    by_path = {
        f"L{keystr(path)}": spec for path, spec in tree_flatten_with_path(bound(module, {spec.name: spec for spec in inputs}))[0]
    }
    named = re.findall(r"(L(?:\[[^\[\]]+\])+)\.size\(\)\[(\d+)\]", text)
    dims = [str(by_path[path].shape[int(axis)]) for path, axis in named if path in by_path]
    return list(dict.fromkeys(dims or (dim for spec in inputs for dim in spec.dynamic)))


def _first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return re.sub(r"\x1b\[[0-9;]*m", "", line)[:300]
