"""The recipe for torchvision's classifiers and segmenters. Nothing is downloaded."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from deploy.artifact.tensors import TensorSpec
from deploy.errors import FactoryError, UsageError
from deploy.intake.recipe import Interface, Recipe, cannot_build, refuse_pretrained
from deploy.words import did_you_mean

try:
    from torchvision import models
except ImportError as error:
    raise FactoryError(
        f"torchvision:NAME needs torchvision, which is not installed: pip install torchvision ({error})"
    ) from error

_OTHER_TASKS = ("detection", "video", "optical_flow", "quantization")
_SEGMENTATION = "segmentation"
_PRETRAINED = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")


class TorchvisionRecipe(Recipe):
    """`torchvision.models.get_model(NAME, weights=None)`."""

    def __init__(self, name: str) -> None:
        self.factory = f"torchvision:{name}"
        self._name = name
        known = [other for other in models.list_models() if _task(other) not in _OTHER_TASKS]
        if name not in known:
            if name in models.list_models():
                raise UsageError(f"{self.factory} is a model for {_task(name)}; expected a classifier or a segmenter")
            raise UsageError(f"torchvision has no model {name!r}{did_you_mean(name, known)}")
        self._segmenter = _task(name) == _SEGMENTATION
        self.default_classes = 21 if self._segmenter else 1000

    def build(self, args: Mapping[str, Any]) -> nn.Module:
        refuse_pretrained(self.factory, args, _PRETRAINED)
        options: dict[str, Any] = {"weights": None} | dict(args)
        if "weights_backbone" in inspect.signature(models.get_model_builder(self._name)).parameters:
            options.setdefault("weights_backbone", None)
        if self._name in ("googlenet", "inception_v3"):
            options.setdefault("init_weights", True)  # the default; torchvision warns if it is not given
        try:
            module: nn.Module = models.get_model(self._name, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise cannot_build(self.factory, args, error) from error
        if self._segmenter:
            _return_tensors(module)
        return module

    def describe(self, module: nn.Module, args: Mapping[str, Any]) -> Interface:
        size = args.get("image_size") or args.get("input_size") or (299 if self._name == "inception_v3" else 224)
        height, width = (size, size) if isinstance(size, int) else size
        auxiliary = self._segmenter and getattr(module, "aux_classifier", None) is not None
        return Interface(
            inputs=(TensorSpec(name="input", dtype="float32", shape=(1, 3, height, width)),),
            outputs=("logits", "aux") if auxiliary else ("logits",),
            preprocess="imagenet",
        )


def _task(name: str) -> str:
    """The subpackage that defines the model: `detection`, `segmentation`, ...; a classifier's own module otherwise."""
    return str(models.get_model_builder(name).__module__).split(".")[2]


def _return_tensors(module: nn.Module) -> None:
    """Make a segmenter return a tensor or a tuple of tensors in place of torchvision's dict.

    This replaces the class instead of wrapping the module, so that parameters keep their names in torchvision.
    """
    kind = type(module)
    forward: Callable[..., Any] = kind.forward

    def forward_tensors(self: nn.Module, x: Any) -> Any:
        outputs = tuple(forward(self, x).values())
        return outputs if len(outputs) > 1 else outputs[0]

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward_tensors, "__module__": kind.__module__})
