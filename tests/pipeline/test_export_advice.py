"""Advice about an input that the eager module does not run: only what was tried, and helps."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploy.artifact.tensors import TensorSpec
from deploy.errors import ExportError
from deploy.pipeline.export_parity import run_eager

IDS = TensorSpec(name="ids", dtype="int64", shape=("batch", "L"))
X = TensorSpec(name="x", dtype="float32", shape=("batch", 4))


class Positions(nn.Module):
    """With a table of 100 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 8), nn.Embedding(100, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


class Table(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.arange(9)[(ids * 1.0).long()]


class Missing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.nothing(x)


class Pair(nn.Module):
    def forward(self, x: Tensor, other: Tensor, scale: float = 1.0) -> Tensor:
        return x + other * scale


class Unready(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not fitted yet")


class OneRow(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids.reshape(1, 6)


CASES = {
    "a length": (Positions(), IDS, (1, 224), "it runs with L 100: give a number in place of L with `inputs`, or feeds of sizes"),
    "an integer": (Table(), IDS, (1, 6), "it runs where ids is 0: say the range of the integers"),
    "a dtype": (nn.Embedding(5, 2), X, (1, 4), "it runs where x is int64: say so with `inputs`, x=SHAPE:int64"),
    "a float": (nn.Linear(4, 2), TensorSpec(name="x", dtype="int64", shape=("batch", 4)), (1, 4), "it runs where x is float32"),
    "a shape": (nn.Conv2d(3, 4, 3), TensorSpec(name="x", dtype="float32", shape=("batch", 1, 9, 9)), (1, 1, 9, 9), "if it takes another shape"),
    "a parameter": (Pair(), X, (1, 4), "its forward needs other too: give each with `inputs`"),
    "an attribute": (Missing(), X, (1, 4), ""),
    "an error of its own": (Unready(), X, (1, 4), ""),
}  # fmt: skip


@pytest.mark.parametrize(("module", "spec", "shape", "expected"), CASES.values(), ids=CASES)
def test_the_advice_is_what_was_tried(module: nn.Module, spec: TensorSpec, shape: tuple[int, ...], expected: str) -> None:
    array = np.full(shape, 9 if isinstance(module, Table) else 1, spec.dtype)
    with pytest.raises(ExportError, match=rf"{type(module).__name__} cannot run {spec.name} {re.escape(str(shape))}") as caught:
        run_eager(module, [spec], {spec.name: array}, [])
    said = str(caught.value).partition("\n")[2]
    assert said.startswith(expected)
    assert bool(said) == bool(expected)


def test_a_key_that_is_missing_is_called_that() -> None:
    class Keyed(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["y"]

    spec = TensorSpec(name="batch.x", dtype="float32", shape=("batch", 4))
    with pytest.raises(ExportError, match=r"cannot run batch\.x \(1, 4\): KeyError\('y'\)$"):
        run_eager(Keyed(), [spec], {"batch.x": np.zeros((1, 4), np.float32)}, [])


@pytest.mark.parametrize(
    ("module", "values", "message"),
    [
        (Table(), 9, r"Table cannot run ids \(2, 6\): .*\nit runs where ids is 0"),
        (OneRow(), 1, r"OneRow cannot be exported: .*fixes the dimension 'batch'.*it runs ids \(1, 6\), and not ids \(2, 6\)"),
    ],
    ids=["a value", "the batch"],
)
def test_the_batch_is_blamed_only_where_rows_that_ran_do_not_run_together(module: nn.Module, values: int, message: str) -> None:
    ran = {"ids": np.zeros((1, 6), np.int64)}
    with pytest.raises(ExportError, match=message):
        run_eager(module, [IDS], {"ids": np.full((2, 6), values)}, [], ran=ran)
