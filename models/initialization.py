"""New random weights for the layers of a net."""

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


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
