"""Modules of many kinds become ONNX graphs."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from deploy.artifact.onnxfile import save_model
from deploy.artifact.tensors import TensorSpec
from deploy.errors import ExportError
from deploy.intake.exporter import export_graph, flatten_outputs


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        result = x.exp()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] * result


class ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].neg() * ctx.scale, None  # type: ignore[attr-defined]


class Adversarial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return ReverseGradient.apply(Exponential.apply(self.linear(x)), 0.5)  # type: ignore[no-any-return, no-untyped-call]


class Unfold(nn.Module):
    """A convolution written as im2col and a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 27))

    def forward(self, x: Tensor) -> Tensor:
        columns = nn.functional.unfold(x, 3, padding=1)
        return (self.weight @ columns).view(x.shape[0], 8, x.shape[2], x.shape[3])


class Fold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.fold(nn.functional.unfold(x, 3, padding=1), (6, 6), 3, padding=1)


class ConvNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class TwoInTwoOut(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"sum": a + b, "product": a * b}


def spec(*shape: int | str, name: str = "x") -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def export(module: nn.Module, *specs: TensorSpec, outputs: tuple[str, ...] = ("y",), **dims: int) -> ir.Model:
    feed = {one.name: torch.randn(one.concrete({"batch": 2, **dims})) for one in specs}
    return export_graph(module.eval(), specs, feed, outputs)


def run(graph: ir.Model, path: Path, **feed: np.ndarray) -> list[np.ndarray]:
    save_model(graph, path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Adversarial(), ("batch", 4)),
        (Unfold(), ("batch", 3, 6, 6)),
        (Fold(), ("batch", 3, 6, 6)),
        (ConvNorm(), ("batch", 3, "H", "W")),
    ],
    ids=["autograd-functions", "unfold", "fold", "conv-batchnorm"],
)
def test_a_module_gives_what_eager_gives_at_other_sizes_than_it_was_exported_with(
    module: nn.Module, shape: tuple[int | str, ...], tmp_path: Path
) -> None:
    graph = export(module, spec(*shape), H=9, W=7)
    x = torch.randn(spec(*shape).concrete({"batch": 5, "H": 12, "W": 8}))
    (result,) = run(graph, tmp_path, x=x.numpy())
    with torch.inference_mode():
        np.testing.assert_allclose(result, module(x).numpy(), rtol=1e-5, atol=1e-5)


def test_symbolic_dimensions_keep_their_names(tmp_path: Path) -> None:
    graph = export(ConvNorm(), spec("batch", 3, "H", "W"), H=9, W=7)
    assert [str(dim) for dim in graph.graph.inputs[0].shape or ()] == ["batch", "3", "H", "W"]
    assert [str(dim) for dim in graph.graph.outputs[0].shape or ()] == ["batch", "8", "H - 2", "W - 2"]


def test_batchnorm_is_folded_into_the_convolution() -> None:
    graph = export(ConvNorm(), spec("batch", 3, 8, 8))
    assert [node.op_type for node in graph.graph] == ["Conv", "Relu"]


def test_nodes_are_named_after_their_modules_and_hold_no_paths(tmp_path: Path) -> None:
    graph = export(nn.Sequential(ConvNorm(), nn.Flatten(), nn.Linear(8 * 36, 4)), spec("batch", 3, 8, 8))
    assert [node.name for node in graph.graph][::3] == ["0.conv/Conv", "2/Gemm"]
    save_model(graph, tmp_path / "model.onnx")
    assert str(Path(__file__).parent).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_several_inputs_and_outputs_get_the_names_they_are_given(tmp_path: Path) -> None:
    specs = (spec("batch", 3, name="left"), spec("batch", 3, name="right"))
    graph = export(TwoInTwoOut(), *specs, outputs=("total", "dot"))
    a, b = np.full((4, 3), 2, np.float32), np.full((4, 3), 5, np.float32)
    total, dot = run(graph, tmp_path, left=a, right=b)
    assert [value.name for value in graph.graph.outputs] == ["total", "dot"]
    np.testing.assert_array_equal(total, a + b)
    np.testing.assert_array_equal(dot, a * b)


def test_weights_over_the_limit_go_into_a_file_of_their_own(tmp_path: Path) -> None:
    graph = export(nn.Linear(64, 64), spec("batch", 64))
    save_model(graph, tmp_path / "model.onnx", external_over=1000)
    assert (tmp_path / "model.onnx.data").stat().st_size >= 64 * 64 * 4
    assert (tmp_path / "model.onnx").stat().st_size < 2000
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


def test_nested_results_are_flattened_with_names() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert list(flatten_outputs(a)) == ["output"]
    assert list(flatten_outputs([a, b])) == ["output_0", "output_1"]
    assert list(flatten_outputs({"boxes": a, "heads": [b, c]})) == ["boxes", "heads_0", "heads_1"]
    with pytest.raises(ExportError, match="returns a str"):
        flatten_outputs("text")


def test_members_of_members_give_way_to_names_that_are_the_users_own() -> None:
    a, b, c, d = (torch.full((1,), float(index)) for index in range(4))
    assert flatten_outputs({"a": [a, b], "a_0": c}) == {"a_0_2": a, "a_1": b, "a_0": c}
    assert flatten_outputs({"a": {"0": a}, "a_0": [b], "a_0_2": c, 1: d}) == {"a_0": a, "a_0_0": b, "a_0_2": c, "1": d}
    assert flatten_outputs({1: a, "1": b}) == {"1": a, "1_2": b}
    assert flatten_outputs({"a": a, "": b, "c": {"": c}}) == {"a": a, "output_1": b, "c_0": c}
    assert flatten_outputs({"": a, "output_0": b}) == {"output_0": a, "output_0_2": b}
    assert flatten_outputs(([a, [b]], {"0": c})) == {"output_0_0": a, "output_0_1_0": b, "output_1_0": c}


def test_none_among_the_outputs_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> object:
            return {"y": x + 1, "loss": None, "more": [None, x * 2]}

    assert list(flatten_outputs(Half()(torch.zeros(1)))) == ["y", "more_1"]
    graph = export(Half(), spec("batch", 3), outputs=("y", "more_1"))
    assert [message for message in caplog.messages if "None" in message] == [
        "loss is None, and is left out",
        "more_0 is None, and is left out",
    ]
    y, more = run(graph, tmp_path, x=np.ones((2, 3), np.float32))
    assert (y == 2).all()
    assert (more == 2).all()
    with pytest.raises(ExportError, match="no tensor but None"):
        flatten_outputs((None, [None]))
    with pytest.raises(ExportError, match="returns a float as 'loss'"):
        flatten_outputs({"y": torch.zeros(1), "loss": 0.5})
