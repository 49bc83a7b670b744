"""A user's own factory, `FILE.py:FACTORY` or `pkg.mod:FACTORY`: finding it, calling it, describing it."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from deploy.artifact.usercode import is_installed, member, split_spec, user_line
from deploy.errors import FactoryError, UsageError
from deploy.intake.isolation import UserModules
from deploy.intake.recipe import Interface, Recipe
from deploy.words import a_type, is_utf8


class UserRecipe(Recipe):
    """A class or function of the user's that makes the module.

    The file's folder and `folder`, which is the current one at the export, are importable while it runs.
    """

    def __init__(self, spec: str, folder: str | None) -> None:
        source, self._name = split_spec(spec, "the model", "FACTORY")
        if isinstance(source, Path) and not source.is_file():
            raise FactoryError(f"no file {source}, which {spec!r} names")
        self.factory = f"{source}:{self._name}"
        self.folder = folder
        self._modules = UserModules(source, folder)
        with self._modules.importable():
            self._callable = self._find(self._modules.load())
        self.source_files = self._modules.source_files
        self._set_parameters()
        if isinstance(source, str) and all(is_installed(file.path) for file in self.source_files):
            self.folder = None  # an installed package needs none

    def build(self, args: Mapping[str, Any]) -> nn.Module:
        self._check_args(args)
        with self._modules.importable():
            try:
                module = self._callable(**args)
            except (Exception, SystemExit) as error:  # the user's code: any error may come
                what = f"{type(error).__name__}: {error}"
                raise FactoryError(
                    f"{self.factory} failed: {what}{user_line(error)}{self._modules.shadow_hint(error)}"
                ) from error
        self.source_files = self._modules.source_files
        odd = [file.path for file in self.source_files if not is_utf8(file.path)]
        if odd:
            raise FactoryError(
                f"the path {odd[0]} is not UTF-8, and PyTorch cannot export a module whose code lies there: rename it"
            )
        if not isinstance(module, nn.Module):
            raise FactoryError(f"{self.factory} returned {a_type(module)}; expected a torch.nn.Module")
        return module

    def describe(self, module: nn.Module, args: Mapping[str, Any]) -> Interface:
        return Interface()

    def _find(self, module: ModuleType) -> Callable[..., Any]:
        value = member(module, self._name, self._modules.source, FactoryError)
        if isinstance(value, nn.Module):
            raise FactoryError(f"{self.factory} is a module already made; expected a class or function that makes one")
        if not callable(value):
            raise FactoryError(f"{self.factory} is {a_type(value)}; expected a class or function that makes a module")
        return value  # type: ignore[no-any-return]

    def _set_parameters(self) -> None:
        try:
            self._signature: inspect.Signature | None = inspect.signature(self._callable)
        except (ValueError, TypeError):  # written in C
            self._signature = None
            self.names_classes = False
            return
        parameters = self._signature.parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        self.names_classes = "num_classes" in parameters
        self.takes_classes = self.names_classes or inspect.Parameter.VAR_KEYWORD in kinds
        if self.names_classes:
            default = parameters["num_classes"].default
            self.needs_classes = default is inspect.Parameter.empty
            self.default_classes = default if isinstance(default, int) else None

    def _check_args(self, args: Mapping[str, Any]) -> None:
        if self._signature is not None:
            try:
                self._signature.bind(**args)
            except TypeError as error:
                raise UsageError(
                    f"{self.factory} does not take these arguments: {error}; it is {self._name}{self._signature}"
                    " (`model_args` NAME=VALUE)"
                ) from error
