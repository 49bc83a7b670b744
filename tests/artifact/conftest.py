"""A small artifact, and the way it is written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.writer import ArtifactWriter

Write = Callable[..., Artifact]


@pytest.fixture
def write(tiny_onnx: Path) -> Write:
    """Writes the tiny ONNX file as an artifact: `write(out)`."""

    def call(out: Path, name: str = "old") -> Artifact:
        bare = open_onnx(tiny_onnx)
        with ArtifactWriter(out) as writer:
            shutil.copyfile(tiny_onnx, writer.path / ONNX)
            return writer.commit(msgspec.structs.replace(bare.manifest, name=name, files={}))

    return call


@pytest.fixture
def made(write: Write, tmp_path: Path) -> Artifact:
    """An artifact of the tiny ONNX file at `tmp_path / "made"`."""
    return write(tmp_path / "made")
