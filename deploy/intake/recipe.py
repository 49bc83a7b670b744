"""A recipe makes one module: the common interface to our architectures, to libraries and to the user's files."""

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
    """The inputs and outputs of a module, as far as its recipe knows them.

    inputs: the leading 1 of every shape is the batch. outputs: names in order.
    preprocess: the name of a preset, or the preprocessing of the library that defines the net.
    """

    inputs: tuple[TensorSpec, ...] | None = None
    outputs: tuple[str, ...] | None = None
    preprocess: str | Preprocess | None = None


class Recipe(ABC):
    """How to make one module.

    factory: its name in the manifest. source_files: after `build`, the user's files that the module was made from.
    folder: the current folder, if the user's modules were imported from it; else None.
    takes_classes: whether `num_classes` may be given; names_classes: whether it is certainly an argument.
    needs_classes: whether it must be given. default_classes: its default; None if unknown.
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
        """A new module. Raises UsageError for arguments that the factory does not take, FactoryError if it fails otherwise."""

    @abstractmethod
    def describe(self, module: nn.Module, args: Mapping[str, Any]) -> Interface:
        """The inputs and outputs of a module that was made with `args`."""


def cannot_build(factory: str, args: Mapping[str, Any], error: Exception) -> DeployError:
    """The error to raise for a library's `error`: a UsageError if there are arguments, because they are the likely cause."""
    given = ", ".join(f"{name}={value!r}" for name, value in args.items())
    if given:
        return UsageError(f"cannot build {factory} with {given}: {error}")
    return FactoryError(f"cannot build {factory}: {error}")


def refuse_pretrained(factory: str, args: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise UsageError for an argument that makes a library download weights."""
    for name in names:
        if args.get(name):
            raise UsageError(f"{factory}: {name}={args[name]!r} would download weights; give them with `weights`")
