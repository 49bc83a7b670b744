"""The user's names stay, whatever the values inside the graph are called."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from deploy.artifact.tensors import TensorSpec
from deploy.intake.exporter import export_graph
from deploy.intake.graph_names import name_graph


class Net(nn.Module):
    """A convolution; weights, a buffer and values inside whose names the tests give to inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).mean((2, 3))
        return torch.flip(torch.softmax(y * self.scale, 1), (1,)), torch.relu(y)


class Loop(nn.Module):
    """A graph with subgraphs."""

    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos() * 2, (x,)), x.exp()


class Same(nn.Module):
    """Outputs that are an input, a weight, and one value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 3))

    def forward(self, x: Tensor) -> Any:
        y = x + 1
        return y, x, y, self.weight


def names_inside(graph: ir.Model) -> list[str]:
    ends = {id(value) for value in (*graph.graph.inputs, *graph.graph.outputs)}
    values = [value for part in graph.graphs() for node in part for value in node.outputs] + list(
        graph.graph.initializers.values()
    )
    return [str(value.name) for value in values if id(value) not in ends]


@pytest.mark.parametrize(
    ("module", "shape", "count"),
    [(Net(), (3, 8, 8), 2), (Loop(), (3,), 2), (Same(), (3,), 4)],
    ids=["weights and values", "subgraphs", "outputs twice"],
)
def test_names_of_values_inside_may_be_given_to_inputs_and_outputs(module: nn.Module, shape: tuple[int, ...], count: int) -> None:
    feed = torch.randn(2, *shape)
    plain = [TensorSpec(name="x", dtype="float32", shape=("batch", *shape))]
    graph = export_graph(module.eval(), plain, {"x": feed}, [f"y{index}" for index in range(count)])
    inside = [*names_inside(graph), *(str(node.name) for node in graph.graph), "scale", "val_0"]
    for start in range(0, min(len(inside), 12), 3):
        names = (inside * 3)[start : start + count + 1]
        names = [name if name not in names[:index] else f"{name}_2" for index, name in enumerate(names)]
        spec = TensorSpec(name=names[0], dtype="float32", shape=("batch", *shape))
        name_graph(graph, [spec], names[1:])
        proto = ir.to_proto(graph)
        onnx.checker.check_model(proto, full_check=True)
        assert [value.name for value in proto.graph.input] == names[:1]
        assert [value.name for value in proto.graph.output] == names[1:]
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        x = torch.randn(2, *shape)
        with torch.inference_mode():
            expected = module(x)
        for got, wanted in zip(session.run(None, {names[0]: x.numpy()}), expected, strict=True):
            np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)
