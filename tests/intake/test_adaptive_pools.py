"""Adaptive pooling to a grid, exported with dynamic sizes and run at many."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import deploy
from deploy.artifact.tensors import TensorSpec
from deploy.intake.exporter import export_graph

CASES = {
    "average, square": (nn.AdaptiveAvgPool2d(4), 2),
    "average, 3x5": (nn.AdaptiveAvgPool2d((3, 5)), 2),
    "average, one axis kept": (nn.AdaptiveAvgPool2d((3, None)), 2),
    "average, of one column": (nn.AdaptiveAvgPool2d((4, 1)), 2),
    "maximum": (nn.AdaptiveMaxPool2d((3, 2)), 2),
    "average over time": (nn.AdaptiveAvgPool1d(7), 1),
    "maximum over time": (nn.AdaptiveMaxPool1d(5), 1),
    "average of a volume": (nn.AdaptiveAvgPool3d((2, 3, 2)), 3),
}


class Called(nn.Module):
    """A pyramid that calls the function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([functional.adaptive_avg_pool2d(x, size).flatten(1) for size in (1, 2, 3, 6)], 1)


def session_of(module: nn.Module, axes: int) -> onnxruntime.InferenceSession:
    import onnx_ir as ir

    names = ("D", "H", "W")[3 - axes :]
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3, *names))
    example = torch.randn(2, 3, *(32, 28, 24)[3 - axes :])
    model = export_graph(module.eval(), [spec], {"x": example}, ["y"])
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("module", "axes"), [*CASES.values(), (Called(), 2)], ids=[*CASES, "called"])
def test_a_grid_is_right_at_every_size(module: nn.Module, axes: int) -> None:
    session = session_of(module, axes)
    for size in ((32, 28, 24), (17, 13, 11), (6, 7, 9), (41, 64, 30)):
        x = torch.randn(2, 3, *size[3 - axes :])
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], module(x).numpy(), atol=1e-5)


def test_pooling_of_fixed_sizes_and_to_one_cell_is_left_to_the_exporter() -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1))
    operators = {node.op_type for node in export_graph(
        module.eval(), [TensorSpec(name="x", dtype="float32", shape=("batch", 3, "H", "W"))], {"x": torch.randn(2, 3, 8, 8)}, ["y"]
    ).graph}  # fmt: skip
    assert operators <= {"ReduceMean", "GlobalAveragePool"}


def test_the_export_is_compared_at_a_second_size(tmp_path: Path) -> None:
    (tmp_path / "grid_net.py").write_text("from torch import nn\ndef make():\n    return nn.AdaptiveAvgPool2d((3, 5))\n")
    artifact = deploy.export(tmp_path / "out", model=f"{tmp_path / 'grid_net.py'}:make", inputs=["x=1x3xHxW"])
    assert artifact.manifest.parity is not None
    sizes = [case.sizes for case in artifact.manifest.parity.cases]
    assert sizes[0] != sizes[-1]
    assert all(size % 2 for size in sizes[-1].values())
