"""The recipe for our reference architectures."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from deploy.artifact.tensors import TensorSpec
from deploy.errors import UsageError
from deploy.intake.recipe import Interface, Recipe, cannot_build
from deploy.models.errors import ModelError
from deploy.models.registry import get


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
