"""Artifacts that take images."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.preprocess import Preprocess

RAW = Preprocess(channels=1, scale=1.0)


def make_artifact(folder: Path, *shapes: tuple[int | str, ...], preprocess=RAW, dtype=TensorProto.FLOAT) -> Artifact:
    """An artifact that gives back its inputs."""
    names = [f"x{index}" for index in range(len(shapes))]
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"out_{name}"]) for name in names],
        "identity",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in zip(names, shapes, strict=True)],
        [helper.make_tensor_value_info(f"out_{name}", dtype, shape) for name, shape in zip(names, shapes, strict=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "net.onnx")
    artifact = open_onnx(folder / "net.onnx")
    return Artifact(artifact.path, msgspec.structs.replace(artifact.manifest, preprocess=preprocess), artifact.bare)


@pytest.fixture(name="make_artifact", scope="session")
def make_artifact_fixture() -> Callable[..., Artifact]:
    return make_artifact
