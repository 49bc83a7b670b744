"""The time of every module, by torch's profiler."""

import time

import pytest
import torch
from torch import nn

from deploy.errors import BackendError
from deploy.runtime.module_times import module_times


class Slow(nn.Module):
    """Sleeps before it does nothing."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Slow(0.02), Slow(0.0)])  # a container that is not called itself
        self.turns = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return self.parts[1](self.parts[0](self.parts[0](x)))


class Fickle(Net):
    """Calls a module in every second run only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.turns += 1
        return self.parts[0](x) if self.turns % 2 else x


def test_a_modules_time_is_without_that_of_the_modules_it_calls() -> None:
    layers = module_times(Net(), [torch.zeros(1)], runs=3)
    assert [(layer.name, layer.operator, layer.modules) for layer in layers] == [
        ("Net", "Net", ("",)),
        ("parts.0", "Slow", ("parts.0",)),
        ("parts.1", "Slow", ("parts.1",)),
    ]
    whole, twice, never = (layer.ms for layer in layers)
    assert 10 <= whole < 35
    assert 40 <= twice < 80
    assert never < 10


def test_modules_that_are_not_called_in_every_run_have_no_time() -> None:
    with pytest.raises(BackendError, match="does not call the same modules in every run"):
        module_times(Fickle(), [torch.zeros(1)], runs=3)


def test_hooks_are_taken_off_again() -> None:
    net = Net()
    module_times(net, [torch.zeros(1)], runs=1)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
