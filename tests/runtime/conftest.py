"""Artifacts with what lenet5 lacks: several inputs and outputs, a fixed batch, half precision, an engine's manifest."""

import msgspec
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX, Parent, Target
from deploy.artifact.writer import ArtifactWriter

PAIR = '''
import torch
from torch import nn


class Pair(nn.Module):
    """Two inputs of one batch; outputs in a dict and a tuple. One is an input itself, one a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("anchors", torch.arange(3.0))

    def forward(self, x, index):
        y = torch.relu(self.linear(x))
        return {"y": y, "rest": (y.sum() + index, x), "anchors": self.anchors}
'''


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Inputs x (batch, 4) float32 and index (batch,) int64; outputs y, total, same (x itself) and anchors (a buffer)."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "pair_net.py").write_text(PAIR, encoding="utf-8")
    return deploy.export(
        folder / "pair",
        model=f"{folder / 'pair_net.py'}:Pair",
        inputs=["x=1x4", "index=1:int64"],
        outputs=["y", "total", "same", "anchors"],
    )


@pytest.fixture(scope="session")
def half(shared_lenet5: Artifact) -> Artifact:
    """lenet5 in FP16, inputs and outputs too."""
    return deploy.convert(shared_lenet5, shared_lenet5.path.with_name("lenet5-fp16"), precision="fp16", fp16_io=True)


@pytest.fixture(scope="session")
def engine(shared_lenet5: Artifact) -> Artifact:
    """An artifact that says it is an engine built from lenet5; its plan is no real one."""
    parent = shared_lenet5.manifest
    out = shared_lenet5.path.with_name("lenet5-trt")
    with ArtifactWriter(out) as writer:
        (writer.path / ENGINE).write_bytes(b"plan")
        (writer.path / ONNX).write_bytes(shared_lenet5.onnx_path.read_bytes())
        return writer.commit(
            msgspec.structs.replace(
                parent,
                kind="engine",
                name="lenet5-trt",
                parent=Parent(path="../lenet5", digest=parent.digest),
                target=Target(flavour="tensorrt-rtx", version="1.7", gpu=None, compute_capability=None, targets=["8.9"]),
            )
        )
