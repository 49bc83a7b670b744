"""How a module is called: by position, by keyword, or with lists and dicts of tensors, by the names of its inputs."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deploy.artifact.tensors import Profile, ShapeRange, TensorSpec
from deploy.errors import UsageError
from deploy.words import count_of

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (*_BY_POSITION, inspect.Parameter.KEYWORD_ONLY)
_CONTAINER = re.compile(r"(?:[\w.]+\.)?(list|dict|tuple|sequence|mapping)\b", re.IGNORECASE)


def bind(module: nn.Module, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `module.forward` that hold `values`, which are by the names of its inputs, in order.

    An input called as a keyword-only parameter is passed by that keyword. `xs.0` and `xs.1` are members of a list that the
    parameter `xs` takes, and `batch.image` is one of a dict that `batch` takes; `batch.views.0` is one of a list in that dict.
    All others are passed by position.

    Raises UsageError, naming the parameter, for what `forward` does not take.
    """
    parameters = _parameters(module)
    if parameters is None:
        return tuple(values.values()), {}
    name = f"{type(module).__name__}.forward"
    keywords, groups, rest = _sorted(parameters, values)
    places = [each for each in parameters.values() if each.kind in _BY_POSITION]
    several = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters.values())
    args: list[Any] = []
    left = list(rest.values())
    for place in places:
        if place.name in groups:
            args.append(_container(name, place.name, groups.pop(place.name)))
        elif not left:
            break
        elif container := _annotated(place):
            raise UsageError(f"{name} takes a {container} as {place.name!r}: {_members(place.name)}")
        else:
            args.append(left.pop(0))
    if left and not several:
        _refuse_rest(name, parameters, list(rest), values)
    for parameter in parameters.values():
        if parameter.name in groups:
            keywords[parameter.name] = _container(name, parameter.name, groups[parameter.name])
    return (*args, *left), {key: keywords[key] for key in parameters if key in keywords}


def dynamic_shapes(module: nn.Module, inputs: Sequence[TensorSpec], profile: Profile | None = None) -> dict[str, Any]:
    """What torch.export is told about the sizes of `inputs`: the symbolic dimensions, in the structure of the arguments.

    profile: the smallest and largest sizes. A dimension with one size alone is fixed. None: any size.
    """
    return bound(module, {spec.name: _dynamic_axes(spec, profile[spec.name] if profile else None) for spec in inputs})


def _dynamic_axes(spec: TensorSpec, sizes: ShapeRange | None) -> dict[int, Any] | None:
    axes = [axis for axis, dim in enumerate(spec.shape) if isinstance(dim, str)]
    if sizes is None:
        return dict.fromkeys(axes, torch.export.Dim.DYNAMIC) or None
    ranged: Any = torch.export.Dim.DYNAMIC  # a hint, which makes one with a range when it is called
    return {a: ranged(min=sizes.min[a], max=sizes.max[a]) for a in axes if sizes.min[a] < sizes.max[a]} or None


def bound(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` by the parameters of `module.forward`, in the structure in which `bind` passes them."""
    if _parameters(module) is None:
        return dict(values)
    args, kwargs = bind(module, values)
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


class ByPosition(nn.Module):
    """A module that takes its inputs by position, whatever the parameters of its `forward` are."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self._names = tuple(names)

    def forward(self, *tensors: Any) -> Any:
        args, kwargs = bind(self.module, dict(zip(self._names, tensors, strict=True)))
        return self.module(*args, **kwargs)


def by_position(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """`module`, as something that takes the inputs of these names by position: itself where it does."""
    args, kwargs = bind(module, {name: name for name in names})
    return module if args == tuple(names) and not kwargs else ByPosition(module, names)


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter] | None:
    try:
        return dict(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # written in C
        return None


def _sorted(
    parameters: Mapping[str, inspect.Parameter], values: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """What is passed by keyword, what are members of a list or a dict, by the parameter, and what is passed by position."""
    keywords: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    rest: dict[str, Any] = {}
    for name, value in values.items():
        owner, dot, key = name.partition(".")
        parameter = parameters.get(name)
        if parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            keywords[name] = value
        elif dot and key and owner in parameters and parameters[owner].kind in _NAMED:
            groups.setdefault(owner, {})[key] = value
        else:
            rest[name] = value
    return keywords, groups, rest


def _container(name: str, parameter: str, members: Mapping[str, Any]) -> list[Any] | dict[str, Any]:
    """The list or dict of `members`, whose keys may lead through further lists and dicts."""
    inner: dict[str, dict[str, Any]] = {}
    for key, value in members.items():
        first, _, rest = key.partition(".")
        inner.setdefault(first, {})[rest] = value
    made: dict[str, Any] = {}
    for first, group in inner.items():
        place = f"{parameter}.{first}"
        if "" in group and len(group) > 1:
            raise UsageError(f"{name} cannot be given {place} both as a tensor and with members, {place}.{list(group)[-1]}")
        made[first] = group[""] if "" in group else _container(name, place, group)
    keys = list(made)
    if not any(key.isdecimal() for key in keys):
        return made
    if keys != [str(index) for index in range(len(keys))]:
        given = ", ".join(f"{parameter}.{key}" for key in keys)
        raise UsageError(
            f"{name} cannot be given {given}: members of a list are {parameter}.0, {parameter}.1 and so on, in order"
        )
    return list(made.values())


def _annotated(parameter: inspect.Parameter) -> str:
    """`list`, `dict` or the like where the annotation says so, else ""."""
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "") or str(annotation)
    found = _CONTAINER.match(text)
    return found[1].lower() if found else ""


def _members(parameter: str) -> str:
    return f"name its members with `inputs`, {parameter}.0=..., {parameter}.1=... of a list, {parameter}.KEY=... of a dict"


def _refuse_rest(name: str, parameters: Mapping[str, inspect.Parameter], rest: Sequence[str], values: Mapping[str, Any]) -> None:
    places = [each.name for each in parameters.values() if each.kind in _BY_POSITION]
    alone = [each.name for each in parameters.values() if each.kind is inspect.Parameter.KEYWORD_ONLY and each.name not in values]
    anything = next((each.name for each in parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD), None)
    shown = f" ({', '.join(places)})" if places else ""
    text = f"{name} takes {count_of(len(places), 'input')} by position{shown}, and {len(rest)} are given: {', '.join(rest)}"
    if alone:
        remedy = f"{', '.join(map(repr, alone))} is taken by keyword alone: name an input so with `inputs`"
    elif anything is not None:
        remedy = f"torch.export does not take what **{anything} holds: wrap the module in one whose forward names its inputs"
    elif places:
        remedy = f"if {places[-1]!r} takes a list or a dict, {_members(places[-1])}"
    else:
        remedy = "leave them out"
    raise UsageError(f"{text}\n{remedy}")
