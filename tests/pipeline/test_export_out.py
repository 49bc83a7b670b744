"""Where artifacts go when no directory is named."""

import shutil
from pathlib import Path

import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import OutputError
from deploy.models.registry import ARCHITECTURES


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """The artifact of a checkpoint, `best.pth`, at its default place `build/mlp` in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.save(ARCHITECTURES["mlp"].create().state_dict(), "best.pth")
    return deploy.export(arch="mlp", weights="best.pth")


def test_random_weights_do_not_replace_trained_ones_by_default(trained: Artifact) -> None:
    with pytest.raises(
        OutputError, match=r"build/mlp holds trained weights \(best\.pth\), and .* random .* `out` or `name`, or delete"
    ):
        deploy.export(arch="mlp")
    with pytest.raises(OutputError, match="build/mlp holds trained weights"):
        deploy.export(arch="lenet5", name="mlp")
    assert Artifact.open("build/mlp").manifest == trained.manifest
    assert deploy.export(arch="mlp", name="other").manifest.source.random
    assert deploy.export("build/mlp", arch="mlp").manifest.source.random  # named, so it is meant
    assert deploy.export(arch="mlp", num_classes=3).manifest.source.random


def test_trained_weights_replace_trained_ones(trained: Artifact) -> None:
    torch.save(ARCHITECTURES["mlp"].create().state_dict(), "better.pth")
    assert deploy.export(arch="mlp", weights="better.pth").manifest.source.weights == "better.pth"


def test_a_bare_onnx_file_is_named_after_its_stem_and_replaces_no_export(trained: Artifact) -> None:
    shutil.copy(trained.onnx_path, "net.onnx")
    made = deploy.export(onnx="net.onnx")
    assert (made.manifest.name, made.path) == ("net", Path("build/net").absolute())
    assert deploy.export(onnx="net.onnx", name="net").manifest.name == "net"  # again
    shutil.copy(trained.onnx_path, "mlp.onnx")
    with pytest.raises(OutputError, match=r"build/mlp holds trained weights .* this export is of a bare ONNX file"):
        deploy.export(onnx="mlp.onnx")
    assert Artifact.open("build/mlp").manifest == trained.manifest
    assert deploy.export("build/mlp", onnx="mlp.onnx").manifest.source.factory is None
