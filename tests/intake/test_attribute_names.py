"""Parts of a module may have any name that torch takes."""

import re

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from deploy.artifact.tensors import TensorSpec
from deploy.errors import ExportError
from deploy.intake.exporter import export_graph


class Named(nn.Module):
    """A submodule, a parameter and a buffer of each of `names`."""

    def __init__(self, *names: str, registered: bool = True) -> None:
        super().__init__()
        self.names = names
        for name in names:
            layer, weight, scale = nn.Linear(3, 3), nn.Parameter(torch.rand(3)), torch.rand(3)
            part = nn.Module()
            if registered:
                self.add_module(name, layer)
                part.register_parameter(name, weight)
                part.register_buffer(f"{name}2", scale)
            else:
                self._modules[name], part._parameters[name], part._buffers[f"{name}2"] = layer, weight, scale
            self.add_module(f"{name or 'none'}_part".replace(".", "_"), part)
        self.parts = [part for part in self.children() if not isinstance(part, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        for name, part in zip(self.names, self.parts, strict=True):
            x = self._modules[name](x) * part._parameters[name] + part._buffers[f"{name}2"]  # type: ignore[misc, operator]
        return x


def test_a_part_may_have_any_name_that_torch_takes() -> None:
    names = (
        "class",
        "None",
        "lambda",
        'a"b',
        "a'b",
        "a\nb",
        "a\\b",
        "a/b",
        "a b",
        "größe",
        "名",
        "1",
        "x",
        "y",
        "keys",
        "self",
        "output",
    )
    module = Named(*names).eval()
    graph = export_graph(module, [TensorSpec(name="x", dtype="float32", shape=("batch", 3))], {"x": torch.rand(2, 3)}, ["y"])
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.rand(5, 3)
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["a.b", "0.weight", "", "forward"])
def test_a_name_that_torch_refuses_is_named(name: str) -> None:
    module = nn.Sequential(nn.ReLU(), Named(name, registered=False)).eval()
    with pytest.raises(ExportError, match=rf"it holds '1\.{re.escape(name)}', a name that torch lets no part be registered by"):
        export_graph(module, [TensorSpec(name="x", dtype="float32", shape=("batch", 3))], {"x": torch.rand(2, 3)}, ["y"])
