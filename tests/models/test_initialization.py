import math

import pytest
import torch
from torch import nn

from deploy.models.initialization import initialize_weights


def test_initialized_weights_have_the_variance_of_their_formulas() -> None:
    torch.manual_seed(0)
    conv, deep = nn.Conv2d(16, 64, 3), nn.Conv2d(256, 256, 3, groups=256)
    linear, norm = nn.Linear(300, 100), nn.BatchNorm2d(8)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.data.fill_(3.0)
    initialize_weights(nn.Sequential(conv, deep, linear, norm))
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    assert deep.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert linear.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 400), rel=0.01)
    assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.05)
    assert all(not bias.any() for bias in (conv.bias, deep.bias, linear.bias, norm.bias, norm.running_mean))
    assert all((ones == 1).all() for ones in (norm.weight, norm.running_var))
