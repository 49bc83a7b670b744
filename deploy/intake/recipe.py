"""A recipe: how to make one module, whatever library or file its factory is in; and its arguments in JSON."""

import ast
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deploy.artifact.manifest import SourceFile
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import TensorSpec
from deploy.errors import DeployError, FactoryError, UsageError
from deploy.models.errors import ModelError
from deploy.models.registry import get

_TUPLE = "tuple"
_WORDS = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a module takes and gives, as far as its recipe knows.

    inputs: the leading 1 of each shape is the batch. outputs: names in order.
    preprocess: name of a preset, or how the library that defines the net prepares an image.
    """

    inputs: tuple[TensorSpec, ...] | None = None
    outputs: tuple[str, ...] | None = None
    preprocess: str | Preprocess | None = None


class Recipe(ABC):
    """How to make one module.

    factory: its name in the manifest. source_files: the user's own files that it came from, after `build`.
    folder: the current folder that the user's modules were imported from; None where none was needed.
    takes_classes: whether `num_classes` may be given; names_classes: whether it is known to be an argument.
    needs_classes: whether it must be given. default_classes: its default where that is known.
    """

    factory: str
    source_files: tuple[SourceFile, ...] = ()
    folder: str | None = None
    takes_classes = True
    names_classes = True
    needs_classes = False
    default_classes: int | None = None

    @abstractmethod
    def build(self, args: Mapping[str, Any]) -> nn.Module:
        """A new module. Raises UsageError for arguments that it does not take, FactoryError when it fails otherwise."""

    @abstractmethod
    def describe(self, module: nn.Module, args: Mapping[str, Any]) -> Interface:
        """What a module made with `args` takes and gives."""


class ReferenceRecipe(Recipe):
    """One of the reference architectures of `deploy.models`."""

    def __init__(self, name: str) -> None:
        try:
            self._architecture = get(name)
        except ModelError as error:
            raise UsageError(f"{error}; or torchvision:NAME, timm:NAME") from error
        self.factory = name
        self.default_classes = self._architecture.arguments.get("num_classes")
        self.takes_classes = self.names_classes = self.default_classes is not None

    def build(self, args: Mapping[str, Any]) -> nn.Module:
        try:
            return self._architecture.create(**args)
        except (ModelError, TypeError, RuntimeError) as error:  # the last two: an argument of another type, or too large
            raise cannot_build(self.factory, args, error) from error

    def describe(self, module: nn.Module, args: Mapping[str, Any]) -> Interface:
        specs = [TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in self._architecture.inputs.items()]
        return Interface(inputs=tuple(specs), outputs=self._architecture.outputs, preprocess=self._architecture.preprocess)


def cannot_build(factory: str, args: Mapping[str, Any], error: Exception) -> DeployError:
    """What to raise for a library's `error`: a UsageError where arguments were given, which are then to blame."""
    given = ", ".join(f"{name}={value!r}" for name, value in args.items())
    if given:
        return UsageError(f"cannot build {factory} with {given}: {error}")
    return FactoryError(f"cannot build {factory}: {error}")


def refuse_pretrained(factory: str, args: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise UsageError for an argument by which a library would download weights."""
    for name in names:
        if args.get(name):
            raise UsageError(f"{factory}: {name}={args[name]!r} would download weights; give them with --weights FILE")


def parse_model_args(texts: Sequence[str]) -> dict[str, Any]:
    """`["depths=(2, 2)", "act=relu", "bias=false"]` -> `{"depths": (2, 2), "act": "relu", "bias": False}`.

    A value is a Python literal (numbers, strings in quotes, tuples, lists, dicts), true, false or none in any case, and
    else a string. Raises UsageError for a text without `=`, a name that is none or given twice, and a value that begins
    as a tuple, list, dict or quoted string and is none.
    """
    args: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"cannot read the model argument {text!r}; expected NAME=VALUE")
        if name in args:
            raise UsageError(f"the model argument {name!r} is given twice")
        if value.lower() in _WORDS:
            args[name] = _WORDS[value.lower()]
            continue
        try:
            args[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError) as error:
            if value.startswith(("(", "[", "{", "'", '"')):
                raise UsageError(
                    f"cannot read the model argument {text!r}: its value is no Python literal (strings within one need quotes)"
                ) from error
            args[name] = value
    record_args(args)
    return args


def record_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """`args` for the manifest: JSON, tuples marked as such. Raises UsageError for what cannot be written so."""
    recorded = {name: _to_json(value, name) for name, value in args.items()}
    try:
        json.dumps(recorded, allow_nan=False)
    except ValueError as error:
        raise UsageError(f"a model argument cannot be recorded: {error}") from error
    return recorded


def recorded_args(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `record_args` recorded."""
    return {name: _from_json(value) for name, value in recorded.items()}


def _to_json(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {_TUPLE: [_to_json(item, name) for item in value]}
    if isinstance(value, list):
        return [_to_json(item, name) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and list(value) != [_TUPLE]:
        return {key: _to_json(item, name) for key, item in value.items()}
    raise UsageError(
        f"the model argument {name!r} is a {type(value).__name__}, which the manifest cannot record: expected numbers, strings,"
        " booleans, None, and tuples, lists or dicts of them"
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        if list(value) == [_TUPLE]:
            return tuple(_from_json(item) for item in value[_TUPLE])
        return {key: _from_json(item) for key, item in value.items()}
    return value
