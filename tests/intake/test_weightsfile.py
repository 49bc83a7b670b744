from pathlib import Path

import pytest
import torch
from torch import nn

from deploy.errors import CheckpointError
from deploy.intake.weightsfile import load_saved, save_weights
from deploy.models import create


def is_loaded(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items() if name in state)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        whole = torch.arange(12.0)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[2:6])
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("empty", torch.zeros(0, 3))


def test_saved_weights_come_back_tied_ones_written_once(tmp_path: Path) -> None:
    source, module = Tied(), Tied()
    source.part.add_(1)
    save_weights(source, tmp_path / "w.safetensors")
    load_saved(module, tmp_path / "w.safetensors")
    assert is_loaded(module, dict(source.state_dict()))
    assert module.head.weight is module.embed.weight
    assert (tmp_path / "w.safetensors").stat().st_size < 2 * 50 * 8 * 4


def test_same_weights_make_the_same_file(tmp_path: Path) -> None:
    module = Tied()
    for name in ("a", "b"):
        save_weights(module, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saved_weights_do_not_load_into_another_module(tmp_path: Path) -> None:
    save_weights(create("lenet5"), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the ConvNet that was rebuilt"):
        load_saved(create("convnet"), tmp_path / "w.safetensors")


def test_damaged_saved_weights_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match=r"w.safetensors cannot be read"):
        load_saved(create("lenet5"), tmp_path / "w.safetensors")


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"step": 1}


def test_state_that_safetensors_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'_extra_state' of Extra is a dict: only tensors"):
        save_weights(Extra(1, 1), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="'weight' of LazyLinear has no values yet"):
        save_weights(nn.LazyLinear(3), tmp_path / "w.safetensors")
