import argparse
import os
import pathlib
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from deploy.errors import CheckpointError
from deploy.intake.checkpoint import read_state_dict


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def opaque(state: Any) -> dict[str, torch.Tensor]:
    return {f"v{number}": tensor for number, tensor in enumerate(state.values())}


def equal(found: Any, expected: Any) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".tar", ".pth.tar"])
def test_what_torch_save_wrote_is_read_in_its_order(tmp_path: Path, suffix: str, zipped: bool) -> None:
    state = net().state_dict()
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / f"x{suffix}", _use_new_zipfile_serialization=zipped)
    found = read_state_dict(tmp_path / f"x{suffix}")
    assert equal(found, state)
    assert found.found_under == "state_dict"
    assert found.ordered
    assert found.metadata is not None
    assert found.metadata["1"]["version"] == 2


def test_safetensors_are_read_and_said_to_be_unordered(tmp_path: Path) -> None:
    state = dict(net().state_dict())
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    found = read_state_dict(tmp_path / "x.safetensors")
    assert dict(found).keys() == state.keys()
    assert torch.equal(found["0.weight"], state["0.weight"])
    assert not found.ordered


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda s: s, ""),
        (lambda s: {"state_dict": s}, "state_dict"),
        (lambda s: {"model": s, "optimizer": {"state": {0: {"m": torch.ones(1)}}, "param_groups": [{}]}}, "model"),
        (lambda s: {"model_state_dict": s, "loss": torch.tensor(1.0)}, "model_state_dict"),
        (lambda s: {"ema": s, "step": torch.tensor(5)}, "ema"),
        (lambda s: {"state_dict_ema": s}, "state_dict_ema"),
        (lambda s: {"net": s}, "net"),
        (lambda s: {"checkpoint": {"model": s}}, "checkpoint.model"),
        (lambda s: {"model": {"state_dict": s}}, "model.state_dict"),
        (lambda s: {"student": s, "epoch": 1}, "student"),
        (lambda s: {**s, "epoch": 1}, ""),
    ],
)
def test_weights_are_found_where_training_loops_put_them(tmp_path: Path, wrap: Any, where: str) -> None:
    state = net().state_dict()
    torch.save(wrap(state), tmp_path / "x.pt")
    found = read_state_dict(tmp_path / "x.pt")
    assert equal(found, state)
    assert found.found_under == where


def test_trained_weights_come_before_their_average_and_the_others_are_named(tmp_path: Path) -> None:
    trained, average = net().state_dict(), net().state_dict()
    torch.save({"ema": average, "state_dict": trained}, tmp_path / "x.pt")
    found = read_state_dict(tmp_path / "x.pt")
    assert equal(found, trained)
    assert (found.found_under, found.others) == ("state_dict", ("ema",))


def test_several_sets_of_weights_under_unknown_keys_are_not_guessed_between(tmp_path: Path) -> None:
    torch.save({"generator": net().state_dict(), "critic": net().state_dict()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="several sets of weights: 'generator', 'critic'"):
        read_state_dict(tmp_path / "x.pt")


def test_counter_of_an_averaged_model_is_no_weight(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(net())
    torch.save(averaged.state_dict(), tmp_path / "x.pt")
    assert "n_averaged" in averaged.state_dict()
    assert "n_averaged" not in read_state_dict(tmp_path / "x.pt")


def test_numbers_and_options_beside_the_weights_are_no_code(tmp_path: Path) -> None:
    state = net().state_dict()
    beside = {
        "acc": np.float64(97.5),
        "history": np.arange(3),
        "args": argparse.Namespace(lr=0.1),
        "out": pathlib.PosixPath("runs"),
    }
    torch.save({"state_dict": state, **beside}, tmp_path / "x.pt")
    assert equal(read_state_dict(tmp_path / "x.pt"), state)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["PAYLOAD_MARK"],))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle_that_carries_code_is_refused_unrun_with_the_way_to_convert_it(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYLOAD_MARK", str(tmp_path / "ran"))
    path = tmp_path / "x.pth"
    torch.save({"state_dict": net().state_dict(), "extra": Payload()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"x.pth is a pickle that would run code .*posix.mkdir(.|\n)*convert it"):
        read_state_dict(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the payload is real
    assert (tmp_path / "ran").exists()


def test_whole_module_is_refused_naming_its_class(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"it asks for torch.nn.modules.container.Sequential(.|\n)*state_dict\(\)"):
        read_state_dict(tmp_path / "x.pt")


def test_missing_checkpoint_and_directory_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*x\.pt"):
        read_state_dict(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is a directory"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_checkpoint_is_an_error_wherever_it_ends(tmp_path: Path, form: str, share: float) -> None:
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pt")
    if form == "safetensors":
        safetensors.torch.save_file(net().state_dict(), path)
    else:
        torch.save(net().state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=str(path)):
        read_state_dict(path)


@pytest.mark.parametrize(
    "content", [b"hello world", b"<html>404</html>", b"\x08\x07onnx", b"\x89PNG\r\n\x1a\n", b"version https://git-lfs"]
)
def test_file_that_is_no_checkpoint_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x.pt is (truncated, damaged or )?not a checkpoint"):
        read_state_dict(tmp_path / "x.pt")


def test_plain_pickle_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": [1, 2]}))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_state_dict(tmp_path / "x.pkl")


def test_torchscript_archive_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript itself
        torch.jit.save(torch.jit.script(net()), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="TorchScript archive, which carries code"):
        read_state_dict(tmp_path / "x.pt")


def test_other_archives_are_named_for_what_they_are(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "inner.pt")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "inner.pt")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "inner.pt")
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(1),)), tmp_path / "x.pt2")
    for name, what in (
        ("x.tar", "is a tar archive: unpack it"),
        ("x.zip", "torch.save did not write"),
        ("x.pt2", "torch.export archive"),
    ):
        with pytest.raises(CheckpointError, match=what):
            read_state_dict(tmp_path / name)


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, {"state_dict": {}}, {"model": {"epoch": 3}}])
def test_file_without_weights_says_what_is_there(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds no weights: expected tensors by name, found"):
        read_state_dict(tmp_path / "x.pt")


def test_content_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds a list; expected a state_dict"):
        read_state_dict(tmp_path / "x.pt")


def test_unreadable_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(net().state_dict(), tmp_path / "x.pt")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)  # tests may run as root, who may read everything
    with pytest.raises(CheckpointError, match=r"cannot read .*: Permission denied"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda s: {"epoch": torch.tensor(3), "best_acc": torch.tensor(0.9), "model_state": s}, "model_state"),
        (
            lambda s: {"confusion": torch.zeros(9, 9), "norm": {"mean": torch.zeros(3)}, "run": {"best": {"own": s}}},
            "run.best.own",
        ),
        (lambda s: {"a": {"b": {"c": {"d": {"e": {"state_dict": s}}}}}}, "a.b.c.d.e.state_dict"),
        (lambda s: {"metrics": {"val.acc": torch.tensor(0.9)}, "learner": s, "seeds": [torch.zeros(5)]}, "learner"),
        (lambda s: {"learner": s, "optimizer": {"state": {n: {"exp.avg": t} for n, t in s.items()}}}, "learner"),
        (lambda s: {"learner": s, "adam": {"param_groups": [{}], "state": {"exp_avg": dict(s)}}}, "learner"),
        (lambda s: (s, {"epoch": 3}), "0"),
        (lambda s: {"epoch": torch.tensor(3), "learner": {"params": opaque(s)}}, "learner.params"),
        (lambda s: {"confusion": torch.zeros(9, 9), "learner": opaque(s), "loss": {"train": torch.zeros(7)}}, "learner"),
        (lambda s: {"models": [{"name": "a", "weights": s}]}, "models.0.weights"),
        (lambda s: {"net": {n: t.numpy() for n, t in s.items()}, "acc": np.float32(0.9), "history": np.arange(3.0)}, "net"),
    ],
)
def test_weights_are_found_at_any_depth_beside_other_tensors(tmp_path: Path, wrap: Any, where: str) -> None:
    state = net().state_dict()
    torch.save(wrap(state), tmp_path / "x.pt")
    found = read_state_dict(tmp_path / "x.pt")
    assert equal(found, opaque(state) if "v0" in found else state)
    assert found.found_under == where


def test_sets_of_weights_at_any_depth_are_all_named(tmp_path: Path) -> None:
    sets = {"student": net().state_dict(), "teacher": net().state_dict(), "epoch": torch.tensor(3)}
    torch.save({"run": {"last": sets}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"several sets of weights: 'run.last.student', 'run.last.teacher'"):
        read_state_dict(tmp_path / "x.pt")


def test_content_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": None, "x": {"epoch": 1}}
    content["model"] = content["x"]["again"] = content
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_state_dict(tmp_path / "x.pt")
    content["0.weight"] = torch.ones(2)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds itself"):
        read_state_dict(tmp_path / "x.pt")


def test_tensors_without_values_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({**net().state_dict(), "1.bias": torch.ones(2, device="meta")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"holds '1.bias' without values"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_weights_are_read_as_the_matrices_that_they_are(layout: torch.layout, tmp_path: Path) -> None:
    weight = torch.eye(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that it is beta
        torch.save({"l.weight": weight.to_sparse(layout=layout), "l.bias": torch.ones(4)}, tmp_path / "x.pt")
    state = read_state_dict(tmp_path / "x.pt")
    assert state["l.weight"].layout is torch.strided
    assert torch.equal(state["l.weight"], weight)
