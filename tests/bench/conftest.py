"""Descendants of lenet5 to compare with it."""

import textwrap

import msgspec
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX, Parent, Target
from deploy.artifact.writer import ArtifactWriter


@pytest.fixture(scope="session")
def half(shared_lenet5: Artifact) -> Artifact:
    """lenet5 in FP16, inputs and outputs too."""
    out = shared_lenet5.path.with_name("lenet5-half")
    return deploy.convert(shared_lenet5, out, precision="fp16", fp16_io=True)


@pytest.fixture(scope="session")
def engine(shared_lenet5: Artifact) -> Artifact:
    """An artifact that says it is an engine built from lenet5; its plan is no real one."""
    parent = shared_lenet5.manifest
    with ArtifactWriter(shared_lenet5.path.with_name("lenet5-engine")) as writer:
        (writer.path / ENGINE).write_bytes(b"plan")
        (writer.path / ONNX).write_bytes(shared_lenet5.onnx_path.read_bytes())
        return writer.commit(
            msgspec.structs.replace(
                parent,
                kind="engine",
                name="lenet5-engine",
                files={},
                parent=Parent(path="../lenet5", digest=parent.digest),
                target=Target(flavour="tensorrt-rtx", version="1.7", gpu=None, compute_capability=None, targets=["8.9"]),
            )
        )


@pytest.fixture(scope="session")
def fixed(shared_lenet5: Artifact) -> Artifact:
    """lenet5 with the same weights and a fixed batch of 1."""
    return deploy.export(shared_lenet5.path.with_name("lenet5-fixed"), arch="lenet5", static_batch=True)


@pytest.fixture(scope="session")
def resizable(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A module for images of any size (x: batch x 3 x H x W), with neither a profile nor preprocessing."""
    folder = tmp_path_factory.mktemp("resizable")
    text = """
        import torch

        class Means(torch.nn.Module):
            def forward(self, x):
                return torch.relu(x).mean((2, 3))
    """
    (folder / "means_net.py").write_text(textwrap.dedent(text), encoding="utf-8")
    return deploy.export(folder / "means", model=f"{folder / 'means_net.py'}:Means", inputs=["x=1x3xHxW"])
