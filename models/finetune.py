"""Helpers for fine-tuning: a new head, frozen layers, new weights."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .errors import ModelError, did_you_mean

_HEADS = ("fc", "heads", "head", "classifier")


def replace_head(module: nn.Module, num_classes: int, name: str | None = None) -> nn.Module:
    """Replace the last linear layer or convolution by a new layer with `num_classes` outputs, and return the new layer.

    The head is searched in `fc`, `heads`, `head` and `classifier`, then in the whole module, unless `name` is given.
    The new layer has the old one's dtype, device and bias, and Xavier (linear) or Kaiming (convolution) weights.
    Raises ModelError if there is no such layer.
    """
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear | _ConvNd)}
    if name is None:
        groups = [[path for path in layers if path == head or path.startswith(f"{head}.")] for head in _HEADS]
        name = next((group[-1] for group in (*groups, list(layers)) if group), None)
        if name is None:
            raise ModelError(f"{type(module).__name__} has no linear layer and no convolution to replace")
    if name not in layers:
        raise ModelError(f"{type(module).__name__} has no linear layer or convolution {name!r}{did_you_mean(name, layers)}")
    if num_classes < 1:
        raise ModelError(f"num_classes must be 1 or more, not {num_classes}")
    old = layers[name]
    like: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, **like)
    else:
        convolution: type[Any] = type(old)
        new = convolution(
            old.in_channels,
            num_classes,
            kernel_size=old.kernel_size,
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
            padding_mode=old.padding_mode,
            **like,
        )
    initialize_weights(new)
    new.train(old.training)
    if name:
        module.set_submodule(name, new)
    return new


def freeze(module: nn.Module, *prefixes: str) -> None:
    """Exclude the parameters under the prefixes (`layer1`, `model.0`, ...) from training; without a prefix, all of them.

    A frozen BatchNorm stays in eval mode, even after `module.train()`, so that its running statistics do not change.
    Raises ModelError for an unknown prefix, before anything is frozen.
    """
    known = [name for name, _ in module.named_modules() if name] + [name for name, _ in module.named_parameters()]
    for prefix in prefixes:
        if prefix.rstrip(".") not in known:
            raise ModelError(f"{type(module).__name__} has no module or parameter {prefix!r}{did_you_mean(prefix, known)}")
    roots = tuple(prefix.rstrip(".") for prefix in prefixes)

    def frozen(name: str) -> bool:
        return not roots or any(name == root or name.startswith(f"{root}.") for root in roots)

    for name, parameter in module.named_parameters():
        if frozen(name):
            parameter.requires_grad_(False)
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and frozen(name):
            layer.eval()
            # On the instance, so that it survives copying and pickling and does not change the class.
            layer.train = partial(_stay_in_eval, layer)  # type: ignore[method-assign]


def _stay_in_eval(layer: _BatchNorm, mode: bool = True) -> _BatchNorm:
    return layer


def initialize_weights(module: nn.Module) -> None:
    """Give every layer of `module` new random weights, in place.

    Convolutions: Kaiming normal, fan-out, ReLU (He et al. 2015, arXiv:1502.01852, section 2.2, as torchvision's ResNet).
    Linear layers: Xavier uniform (Glorot, Bengio, AISTATS 2010, formula 16). BatchNorm and GroupNorm: ones, and new
    running statistics. Biases: zeros.
    """
    for layer in module.modules():
        if isinstance(layer, _ConvNd):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            with torch.no_grad():  # torch's fan-out counts all groups, which makes the weights of a depthwise net far too small
                layer.weight.mul_(math.sqrt(layer.groups))
        elif isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
        elif isinstance(layer, _BatchNorm | nn.GroupNorm):
            if isinstance(layer, _BatchNorm):
                layer.reset_running_stats()
            if layer.weight is not None:
                nn.init.ones_(layer.weight)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
