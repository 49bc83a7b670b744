"""Recurrent layers become ONNX's own operators, which give eager's numbers at every length and batch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from deploy.artifact.onnxfile import save_model
from deploy.artifact.tensors import TensorSpec
from deploy.errors import ExportError
from deploy.intake.exporter import export_graph, flatten_outputs


class Net(nn.Module):
    """A recurrent layer with an initial state where it is given one, and all that the layer returns."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        return self.layer(x, state if len(state) == 2 else state[0]) if state else self.layer(x)


KINDS: dict[str, tuple[nn.RNNBase, int]] = {
    "LSTM": (nn.LSTM(6, 8), 0),
    "LSTM, stacked both ways": (nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True), 0),
    "LSTM without bias, from a state": (nn.LSTM(6, 8, bias=False, batch_first=True), 2),
    "GRU": (nn.GRU(6, 8, batch_first=True), 0),
    "GRU, stacked both ways, from a state": (nn.GRU(6, 8, 2, bidirectional=True), 1),
    "RNN both ways, from a state": (nn.RNN(6, 8, batch_first=True, bidirectional=True), 1),
    "RNN of relu": (nn.RNN(6, 8, 3, nonlinearity="relu", batch_first=True), 0),
}


@pytest.mark.parametrize(("layer", "states"), KINDS.values(), ids=KINDS)
def test_a_recurrent_layer_is_right_at_every_length_and_batch(layer: nn.RNNBase, states: int, tmp_path: Path) -> None:
    module = Net(layer).eval()
    directions = 2 if layer.bidirectional else 1
    sequence = ("batch", "T", 6) if layer.batch_first else ("T", "batch", 6)
    specs = [TensorSpec(name="x", dtype="float32", shape=sequence)]
    specs += [TensorSpec(name=name, dtype="float32", shape=(layer.num_layers * directions, "batch", 8)) for name in "hc"[:states]]

    def feed(batch: int, length: int) -> dict[str, Tensor]:
        return {spec.name: torch.randn(spec.concrete({"batch": batch, "T": length})) for spec in specs}

    example = feed(2, 4)
    graph = export_graph(module, specs, example, list(flatten_outputs(module(*example.values()))))
    operators = [node for node in graph.graph if node.op_type == layer.mode.partition("_")[0]]
    assert len(operators) == layer.num_layers
    assert all(value.is_initializer() for node in operators for value in node.inputs[1:4] if value is not None)
    save_model(graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 2), (2, 33)):
        given = feed(batch, length)
        with torch.inference_mode():
            expected = flatten_outputs(module(*given.values())).values()
        for got, wanted in zip(session.run(None, {name: x.numpy() for name, x in given.items()}), expected, strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(6, 8, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        lengths = torch.full((x.shape[0],), 3)
        return self.layer(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Net(nn.LSTM(6, 8, proj_size=3, batch_first=True)),
            r"return self\.layer.*: ONNX has no LSTM with projections\nleave out proj_size",
        ),
        (Packed(), r"return self\.layer.*: a packed sequence is cut .*\ngive the recurrent layer the padded sequence"),
    ],
    ids=["projections", "packed"],
)
@pytest.mark.parametrize("length", [4, "T"])
def test_what_has_no_operator_is_refused_with_the_users_line(module: nn.Module, message: str, length: int | str) -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", length, 6))
    with pytest.raises(
        ExportError, match=rf"{type(module).__name__} cannot be exported: {__file__}:\d+ in forward of .*{message}"
    ):
        export_graph(module.eval(), [spec], {"x": torch.randn(2, 4, 6)}, ["y"], user_files=[__file__])


@pytest.mark.parametrize("layer", [nn.LSTM(6, 8, batch_first=True), nn.RNN(6, 8, batch_first=True)], ids=["LSTM", "RNN"])
@pytest.mark.parametrize("length", [4, "T"])
def test_a_dtype_that_onnx_runtime_has_no_operator_for_is_refused(layer: nn.RNNBase, length: int | str) -> None:
    spec = TensorSpec(name="x", dtype="float64", shape=("batch", length, 6))
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    with pytest.raises(ExportError, match="ONNX Runtime has no recurrent operator in float64\nmake the layer float32"):
        export_graph(Net(layer).double().eval(), [spec], {"x": x}, ["y"])
