"""Convolutions of a package with a dynamic batch, of every kind that the layout of weights could break."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from deploy.artifact.tensors import ShapeRange, TensorSpec
from deploy.intake.aoti import compile_package


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gray = nn.Conv2d(1, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.pixel = nn.Conv2d(8, 4, 1)
        self.grow = nn.Conv2d(4, 3, 3, padding=2)
        self.one = nn.Conv2d(8, 1, 3, stride=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = functional.relu(self.body(self.gray(x)))
        y = self.shared(y) + y
        small = self.pixel(y.mean((2, 3), keepdim=True))
        return self.shared(functional.avg_pool2d(y, 2)), self.grow(small), self.one(y)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("convolutions") / "model.pt2"
    x = TensorSpec(name="x", dtype="float32", shape=("batch", 1, 12, 12))
    shapes = {"small": (8, 6, 6), "grown": (3, 3, 3), "one": (1, 5, 5)}
    outputs = [TensorSpec(name=name, dtype="float32", shape=("batch", *shape)) for name, shape in shapes.items()]
    profile = {"x": ShapeRange(min=(1, 1, 12, 12), opt=(4, 1, 12, 12), max=(9, 1, 12, 12))}
    compile_package(module(), [x], outputs, path, profile=profile, precision="fp32", device="cpu", max_autotune=False)
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)


def module() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions().eval()


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_convolutions_of_one_channel_and_of_one_pixel_are_right_at_every_batch(runner: Any, batch: int) -> None:
    x = torch.randn(batch, 1, 12, 12)
    with torch.no_grad():
        expected = module()(x)
    for result, reference in zip(runner.boxed_run([x]), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


def test_no_run_lays_out_the_weights_of_a_convolution_again(runner: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the first run may make more
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            runner.boxed_run([torch.randn(4, 1, 12, 12)])
    lines = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert sum(",convolution," in line for line in lines) == 7
    weights = ("8x8x3x3", "8x1x1x3x3", "1x8x3x3", "4x8x1x1")
    assert [line for line in lines if ",reorder," in line and f",{line.split(',')[-2]}," in f",{','.join(weights)},"] == []
