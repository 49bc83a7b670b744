"""A classifier by brightness, and images that it is right about."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.artifact.decode import Decode
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


def save_graph(out: Path, text: str, **fields: Any) -> Artifact:
    """An artifact of the ONNX graph in `text`, with these fields of the manifest."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]>\n{text}')
    with ArtifactWriter(out) as writer:
        onnx.save(model, writer.path / ONNX)
        manifest = open_onnx(writer.path / ONNX).manifest
        return writer.commit(msgspec.structs.replace(manifest, name=out.name, **fields))


def make_segmenter(out: Path, *, noise: float = 0.0, names: list[str] | None = None, size: str = "H, W") -> Artifact:
    """Class 0 of dark pixels, 1 of grey and 2 of bright ones: logits of 3 classes by brightness, 0 to 1; `noise` shifts them."""
    text = f"""g (float[N, 1, {size}] input) => (float[N, 3, {size}] logits)
        <float[3, 1, 1, 1] w = {{0, 4, 8}}, float[3] b = {{0, {-1 - noise}, -4}}> {{ logits = Conv(input, w, b) }}"""
    return save_graph(out, text, preprocess=Preprocess(channels=1), classes=names)


def make_detector(out: Path, *, shift: float = 0.0, names: list[str] | None = None) -> Artifact:
    """Finds grey and bright quarters of images of 16x16: `boxes` of the four quarters, `scores` of background, grey and bright."""
    corners = "0,0,8,8, 8,0,16,8, 0,8,8,16, 8,8,16,16"
    text = f"""g (float[N, 1, 16, 16] input) => (float[N, 4, 4] boxes, float[N, 4, 3] scores)
        <float[3, 1, 1, 1] w = {{0, 24, 40}}, float[3] b = {{4, -4, {-16 - shift}}}, float[1, 4, 4] corners = {{{corners}}},
         int64[3] flat = {{0, 3, 4}}, float[1] none = {{0}}, int64[2] axes = {{1, 2}}, int64[1] last = {{2}}> {{
        means = AveragePool<kernel_shape = [8, 8], strides = [8, 8]>(input)
        maps = Conv(means, w, b)
        rows = Reshape(maps, flat)
        scores = Transpose<perm = [0, 2, 1]>(rows)
        one = ReduceMean<keepdims = 1>(rows, axes)
        zero = Mul(one, none)
        boxes = Add(zero, corners) }}"""
    return save_graph(out, text, preprocess=Preprocess(channels=1, resize=(16, 16)), classes=names, decode=Decode(format="ssd"))


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


@pytest.fixture(name="make_segmenter", scope="session")
def make_segmenter_fixture() -> Callable[..., Artifact]:
    return make_segmenter


@pytest.fixture(name="make_detector", scope="session")
def make_detector_fixture() -> Callable[..., Artifact]:
    return make_detector


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Six pictures of 16x16 (twice as wide for boxes), with masks of 0 dark, 1 grey, 2 bright, some pixels to be ignored."""
    rng = np.random.default_rng(0)
    levels = np.array([20, 100, 230], np.uint8)
    for index in range(6):
        mask = rng.integers(0, 3, (4, 4)).repeat(4, 0).repeat(4, 1)
        image = levels[mask]
        image[rng.random(image.shape) < 0.15] = 100  # pixels that are taken for another class
        mask[0, :3] = 255
        for kind, pixels in (("images", image), ("masks", mask)):
            (tmp_path / "scenes" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "scenes" / kind / f"{index}.png")
    return tmp_path / "scenes"


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    """A COCO JSON of eight pictures of 32x16 with quarters that are dark, grey or bright, and boxes that fit more or less."""
    rng = np.random.default_rng(1)
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "grey"}, {"id": 8, "name": "bright"}],
    }
    (tmp_path / "boxes/images").mkdir(parents=True)
    for index in range(8):
        kinds = rng.integers(0, 3, (2, 2))
        pixels = np.array([10, 110, 230], np.uint8)[kinds].repeat(8, 0).repeat(16, 1)
        Image.fromarray(pixels).save(tmp_path / "boxes/images" / f"{index}.png")
        document["images"].append({"id": 10 + index, "file_name": f"{index}.png", "width": 32, "height": 16})
        for row, column in np.argwhere(kinds > 0):
            x, y = 16 * int(column) + float(rng.uniform(0, 4)), 8 * int(row) + float(rng.uniform(0, 2))
            category = 3 if kinds[row, column] == 1 or rng.random() < 0.2 else 8
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": 10 + index,
                    "category_id": category,
                    "bbox": [x, y, 15, 7],
                    "area": 105.0,
                    "iscrowd": 0,
                }
            )
    path = tmp_path / "boxes/boxes.json"
    path.write_text(json.dumps(document))
    return path
