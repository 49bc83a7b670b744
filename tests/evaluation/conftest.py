"""A classifier by brightness, and images that it is right about."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.writer import ArtifactWriter

NAMES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu"]
GREY = Preprocess(channels=1, crop=8)
SHARPNESS = 100.0


def shade(label: int, classes: int = len(NAMES)) -> int:
    """The grey level that the model of `make_model` takes for class `label`."""
    return round(255 * label / (classes - 1))


def make_model(
    out: Path,
    *,
    classes: int = len(NAMES),
    names: list[str] | None = NAMES,
    preprocess: Preprocess | None = GREY,
    shape: tuple[int | str, ...] = ("batch", 1, 8, 8),
    dtype: int = TensorProto.FLOAT,
    count: int | str | None = None,
    outputs: tuple[str, ...] = ("logits",),
) -> Artifact:
    """A classifier by brightness: its logits are -SHARPNESS (mean - k / (classes - 1))², less what they share."""
    levels = np.arange(classes) / (classes - 1)
    half = dtype == TensorProto.FLOAT16
    arrays = {"w": 2 * SHARPNESS * levels[None], "b": -SHARPNESS * levels**2}
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w", "b"], ["scores"]),
            *(helper.make_node("Cast", ["scores"], [name], to=dtype if half else TensorProto.FLOAT) for name in outputs),
        ],
        "brightness",
        [helper.make_tensor_value_info("input", dtype, shape)],
        [helper.make_tensor_value_info(name, dtype, (shape[0], classes if count is None else count)) for name in outputs],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with ArtifactWriter(out) as writer:
        onnx.save(model, writer.path / ONNX)
        manifest = open_onnx(writer.path / ONNX).manifest
        return writer.commit(msgspec.structs.replace(manifest, name=out.name, preprocess=preprocess, classes=names))


def paint(path: Path, level: int, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)
    return path


def make_folder(root: Path, **images: list[int]) -> Path:
    """One folder a name, holding one image for each class number listed: that which the model will take it for."""
    for name, labels in images.items():
        for index, label in enumerate(labels):
            paint(root / name / f"{index:02}.png", shade(label))
    return root


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_model(tmp_path_factory.mktemp("model") / "brightness")


@pytest.fixture(name="shade", scope="session")
def shade_fixture() -> Callable[..., int]:
    return shade


@pytest.fixture(name="make_model", scope="session")
def make_model_fixture() -> Callable[..., Artifact]:
    return make_model


@pytest.fixture(name="paint", scope="session")
def paint_fixture() -> Callable[..., Path]:
    return paint


@pytest.fixture(name="make_folder", scope="session")
def make_folder_fixture() -> Callable[..., Path]:
    return make_folder
