"""The reference architectures by name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .convnet import ConvNet
from .errors import ModelError, did_you_mean
from .lenet5 import LeNet5
from .mlp import MLP
from .mobilenet_v1 import MobileNetV1, MobileNetV1Features
from .rangeseg import RangeSeg
from .resnet import resnet18, resnet34, resnet50


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One reference architecture.

    inputs: the shape of every float32 input by name; the leading 1 is the batch.
    preprocess: the name of the preset for images (`imagenet`, `mnist`); None if the inputs are no images.
    """

    name: str
    build: Callable[..., nn.Module]
    inputs: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    preprocess: str | None
    paper: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `build` by name, with their defaults."""
        return {name: parameter.default for name, parameter in inspect.signature(self.build).parameters.items()}

    def create(self, **args: Any) -> nn.Module:
        """A new module with random weights, in training mode. Raises ModelError for an unknown argument."""
        known = self.arguments
        for name in args:
            if name not in known:
                accepted = ", ".join(f"{key}={default!r}" for key, default in known.items())
                raise ModelError(f"{self.name} takes no argument {name!r}{did_you_mean(name, known)}; it takes {accepted}")
        classes = args.get("num_classes", 1)
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
            raise ModelError(f"num_classes of {self.name} must be a whole number, 1 or more, not {classes!r}")
        return self.build(**args)


_IMAGENET: dict[str, tuple[int, ...]] = {"input": (1, 3, 224, 224)}
_DIGIT: dict[str, tuple[int, ...]] = {"input": (1, 1, 28, 28)}
_LOGITS = ("logits",)
_MOBILENET = "Howard et al., MobileNets, 2017, arXiv:1704.04861"
_RESNET = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385"

ARCHITECTURES = {
    entry.name: entry
    for entry in (
        Architecture(
            name="mlp",
            build=MLP,
            inputs={"input": (1, 100)},
            outputs=_LOGITS,
            preprocess=None,
            paper="Rumelhart et al., Learning representations by back-propagating errors, Nature 323, 1986",
        ),
        Architecture(
            name="convnet",
            build=ConvNet,
            inputs=_DIGIT,
            outputs=_LOGITS,
            preprocess="mnist",
            paper="Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, NeurIPS 2012",
        ),
        Architecture(
            name="lenet5",
            build=LeNet5,
            inputs=_DIGIT,
            outputs=_LOGITS,
            preprocess="mnist",
            paper="LeCun et al., Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 86(11), 1998",
        ),
        Architecture(name="resnet18", build=resnet18, inputs=_IMAGENET, outputs=_LOGITS, preprocess="imagenet", paper=_RESNET),
        Architecture(name="resnet34", build=resnet34, inputs=_IMAGENET, outputs=_LOGITS, preprocess="imagenet", paper=_RESNET),
        Architecture(name="resnet50", build=resnet50, inputs=_IMAGENET, outputs=_LOGITS, preprocess="imagenet", paper=_RESNET),
        Architecture(
            name="mobilenet_v1", build=MobileNetV1, inputs=_IMAGENET, outputs=_LOGITS, preprocess="imagenet", paper=_MOBILENET
        ),
        Architecture(
            name="mobilenet_v1_features",
            build=MobileNetV1Features,
            inputs=_IMAGENET,
            outputs=("conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "conv7"),
            preprocess="imagenet",
            paper=_MOBILENET,
        ),
        Architecture(
            name="rangeseg",
            build=RangeSeg,
            inputs={"distance": (1, 1, 64, 256), "intensity": (1, 1, 64, 256)},
            outputs=_LOGITS,
            preprocess=None,
            paper="Ronneberger et al., U-Net, MICCAI 2015, arXiv:1505.04597; Wu et al., SqueezeSeg, ICRA 2018, arXiv:1710.07368",
        ),
    )
}


def get(name: str) -> Architecture:
    """The architecture `name`. Raises ModelError, with similar names, if there is none."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise ModelError(
            f"unknown architecture {name!r}{did_you_mean(name, ARCHITECTURES)}; expected one of {', '.join(ARCHITECTURES)}"
        ) from None


def create(name: str, **args: Any) -> nn.Module:
    """A new module of the architecture `name`. Raises ModelError for an unknown name or argument."""
    return get(name).create(**args)
