"""A recipe: how to make one module, whatever library or file its factory is in; and its arguments in JSON."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deploy.artifact.manifest import SourceFile
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import TensorSpec
from deploy.errors import DeployError, FactoryError, UsageError


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
