"""The recipe for timm's models. Nothing is downloaded."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from deploy.artifact.preprocess import INTERPOLATIONS, Preprocess
from deploy.artifact.tensors import TensorSpec
from deploy.errors import FactoryError, UsageError
from deploy.intake.recipe import Interface, Recipe, cannot_build, refuse_pretrained
from deploy.words import did_you_mean

try:
    import timm
    from timm.data.config import resolve_model_data_config
except ImportError as error:
    raise FactoryError(f"timm:NAME needs timm, which is not installed: pip install timm ({error})") from error

_PRETRAINED = ("pretrained", "checkpoint_path")


class TimmRecipe(Recipe):
    """`timm.create_model(NAME, pretrained=False)`; input size and preprocessing are those of timm's configuration."""

    def __init__(self, name: str) -> None:
        self.factory = f"timm:{name}"
        self._name = name
        # For timm a name with a colon or a slash is an address to download from.
        if ":" in name or "/" in name or not timm.is_model(name):
            raise UsageError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")

    def build(self, args: Mapping[str, Any]) -> nn.Module:
        refuse_pretrained(self.factory, args, _PRETRAINED)
        try:
            module: nn.Module = timm.create_model(self._name, **dict(args) | {"pretrained": False})
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise cannot_build(self.factory, args, error) from error
        classes = getattr(module, "num_classes", None)
        self.default_classes = classes if isinstance(classes, int) else None
        return module

    def describe(self, module: nn.Module, args: Mapping[str, Any]) -> Interface:
        config: dict[str, Any] = resolve_model_data_config(module)
        channels, height, width = config["input_size"]
        size = args.get("img_size")
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
        channels = args.get("in_chans", channels)
        return Interface(
            inputs=(TensorSpec(name="input", dtype="float32", shape=(1, channels, height, width)),),
            outputs=None if args.get("features_only") else ("logits" if getattr(module, "num_classes", 1) else "features",),
            preprocess=eval_preprocess(config, height, width) if channels == 3 else None,
        )


def eval_preprocess(config: Mapping[str, Any], height: int, width: int) -> Preprocess | None:
    """timm's transform for evaluation at this input size; None if `Preprocess` cannot express it (borders).

    The shorter side to the crop's size over `crop_pct`, as in timm.data.transforms_factory.transforms_imagenet_eval.
    """
    share, mode = config["crop_pct"], config["crop_mode"]
    if config["interpolation"] not in INTERPOLATIONS or not (mode == "squash" or (mode == "center" and height == width)):
        return None
    resize = (math.floor(height / share), math.floor(width / share))
    return Preprocess(
        resize=resize if mode == "squash" else resize[0],
        crop=height if height == width else (height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
    )
