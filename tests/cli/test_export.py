"""`deploy export`: checkpoints that cannot be loaded, and an output folder that must not be replaced."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.artifact.artifact import Artifact
from tests.cli.helpers import refused

Run = Callable[..., Any]


def test_a_missing_checkpoint(run: Run, tmp_path: Path) -> None:
    refused(run("export", "--arch", "mlp", "--weights", tmp_path / "no.pth", "-o", tmp_path / "out"), 1, "no.pth")
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    refused(run("export", "--arch", "mlp", "--weights", checkpoint, "-o", tmp_path / "out"), 1, "mlp.pth")
    assert not (tmp_path / "out").exists()


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused_and_not_run(run: Run, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    bad = tmp_path / "bad.pth"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "extra": Payload(trap)}, bad)
    refused(run("export", "--arch", "mlp", "--weights", bad, "-o", tmp_path / "out"), 1, "bad.pth", "state_dict")
    bad.write_bytes(pickle.dumps(Payload(trap)))
    refused(run("export", "--arch", "mlp", "--weights", bad, "-o", tmp_path / "out"), 1, "bad.pth")
    assert not trap.exists()


def test_the_wrong_architecture(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    finished = run("export", "--arch", "lenet5", "--weights", checkpoint, "-o", tmp_path / "out")
    refused(finished, 1, "6 missing", "expected 84")


def test_a_directory_with_other_files_beside_the_artifact_is_left_alone(run: Run, lenet5: Artifact) -> None:
    (lenet5.path / "notes.txt").write_text("mine")
    refused(run("export", "--arch", "lenet5", "--num-classes", "3", "-o", lenet5.path), 1, "notes.txt")
    assert (lenet5.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"PK", "is truncated")])
def test_an_empty_or_cut_checkpoint_is_told_from_a_damaged_one(
    run: Run, checkpoint: Path, content: bytes, message: str, tmp_path: Path
) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000] if content else b"")
    refused(run("export", "--arch", "mlp", "--weights", checkpoint, "-o", tmp_path / "out"), 1, message, "copy it again")
