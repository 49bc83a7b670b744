import logging
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.preprocess import Preprocess
from deploy.data.calibration_set import calibration_set
from deploy.errors import DataError, UsageError


@pytest.fixture
def make(tmp_path):
    """Makes an artifact of inputs x0, x1... of the given shapes, which gives them back."""

    def make_artifact(*shapes: tuple[int | str, ...]) -> Artifact:
        infos = [helper.make_tensor_value_info(f"x{index}", TensorProto.FLOAT, shape) for index, shape in enumerate(shapes)]
        nodes = [helper.make_node("Identity", [info.name], [f"y{index}"]) for index, info in enumerate(infos)]
        outs = [helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, shape) for index, shape in enumerate(shapes)]
        model = helper.make_model(
            helper.make_graph(nodes, "g", infos, outs), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
        )
        onnx.save(model, tmp_path / "net.onnx")
        artifact = open_onnx(tmp_path / "net.onnx")
        raw = Preprocess(channels=1, scale=1.0)
        return Artifact(artifact.path, msgspec.structs.replace(artifact.manifest, preprocess=raw), artifact.bare)

    return make_artifact


@pytest.fixture
def images(tmp_path) -> Path:
    """Two classes of ten 4 x 4 images: shades 0 to 9 and 100 to 109."""
    for name, first in (("dark", 0), ("light", 100)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("L", (4, 4), first + index).save(tmp_path / "data" / name / f"{index}.png")
    return tmp_path / "data"


def test_images_are_a_balanced_sample_that_is_the_same_whatever_the_batch(make, images):
    data = calibration_set(make(("N", 1, 4, 4)), images, 10)
    shades = {size: [int(image[0, 0, 0]) for feed in data.feeds(size) for image in feed["x0"]] for size in (1, 3, 32)}
    assert shades[1] == shades[3] == shades[32]
    assert len(shades[1]) == data.count == 10
    assert sum(shade >= 100 for shade in shades[1]) == 5


def test_fewer_images_than_asked_for_and_a_single_class_are_said(make, images, caplog):
    artifact = make(("N", 1, 4, 4))
    calibration_set(artifact, images, 30)
    assert "30 images were asked for" in caplog.text
    assert "holds 20" in caplog.text
    for path in (images / "dark").iterdir():
        path.unlink()
    (images / "dark").rmdir()
    with caplog.at_level(logging.WARNING):
        calibration_set(artifact, images)
    assert "one class only, 'light'" in caplog.text


def test_a_corrupt_image_is_skipped_and_named_and_many_are_an_error(make, images, caplog):
    artifact = make(("N", 1, 4, 4))
    (images / "dark" / "3.png").write_bytes(b"no image")
    data = calibration_set(artifact, images)
    assert sum(len(feed["x0"]) for feed in data.feeds(8)) == 19
    assert data.skipped == [str(images / "dark" / "3.png")]
    assert "3.png" in caplog.text
    (images / "dark" / "4.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"over 5% of 20 images cannot be read.*\.png"):
        list(data.feeds(8))


def test_the_digest_is_of_the_content_and_the_sample(make, images):
    artifact = make(("N", 1, 4, 4))
    first = calibration_set(artifact, images).digest()
    assert calibration_set(artifact, images).digest() == first
    assert calibration_set(artifact, images, 5).digest() != first
    Image.new("L", (4, 4), 200).save(images / "dark" / "3.png")
    assert calibration_set(artifact, images).digest() != first


def test_images_of_another_size_than_the_input_are_refused(make, images):
    with pytest.raises(UsageError, match="4x4"):
        list(calibration_set(make(("N", 1, 8, 8)), images).feeds(4))


def test_a_folder_of_npz_files_feeds_several_inputs(make, tmp_path):
    folder = tmp_path / "feeds"
    folder.mkdir()
    for index in range(3):
        rows = np.full((5, 2), index, np.float32)
        np.savez(folder / f"{index}.npz", x0=rows, x1=rows[:, :1].astype(np.float64))
    data = calibration_set(make(("N", 2), ("N", 1)), folder, 2)
    feeds = list(data.feeds(4))
    assert [(feed["x0"].shape, feed["x1"].shape, feed["x1"].dtype) for feed in feeds] == [
        ((4, 2), (4, 1), np.float32), ((1, 2), (1, 1), np.float32),
    ] * 2  # fmt: skip
    assert data.count == 2


def test_one_sample_without_its_batch_dimension_is_a_batch_of_one(make, tmp_path):
    (tmp_path / "feeds").mkdir()
    np.savez(tmp_path / "feeds" / "a.npz", x0=np.zeros(2, np.float32))
    assert [feed["x0"].shape for feed in calibration_set(make(("N", 2)), tmp_path / "feeds").feeds(4)] == [(1, 2)]


def test_a_feed_whose_batch_is_not_first_is_not_cut_and_one_sample_gets_it_there(make):
    feeds = [{"x0": np.zeros((9, 2), np.float32)}, {"x0": np.zeros((9, 3, 2), np.float32)}]
    assert [feed["x0"].shape for feed in calibration_set(make(("T", "N", 2)), feeds).feeds(4)] == [(9, 1, 2), (9, 3, 2)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((1, 2), np.float32)}, "holds x; expected x0"),
        ({"x0": np.zeros((1, 3), np.float32)}, "expected x0: float32 Nx2"),
        ({"x0": np.zeros((1, 2), np.int64)}, "x0' is int64"),
        ({"x0": np.zeros((1, 1, 1, 2), np.float32)}, "4 dimensions"),
    ],
)
def test_a_feed_that_does_not_fit_is_named(make, tmp_path, arrays, message):
    (tmp_path / "feeds").mkdir()
    np.savez(tmp_path / "feeds" / "bad.npz", **arrays)
    with pytest.raises(DataError, match=f"bad.npz.*{message}"):
        list(calibration_set(make(("N", 2)), tmp_path / "feeds").feeds(4))


def test_a_damaged_npz_file_is_named(make, tmp_path):
    (tmp_path / "feeds").mkdir()
    (tmp_path / "feeds" / "bad.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match=r"bad\.npz"):
        list(calibration_set(make(("N", 2)), tmp_path / "feeds").feeds(4))


def test_an_iterator_of_feeds_is_read_once_and_has_no_digest(make):
    artifact = make(("N", 2))
    feeds = [{"x0": np.full((1, 2), value, np.float32)} for value in range(5)]
    assert calibration_set(artifact, iter(feeds)).digest() is None
    assert calibration_set(artifact, feeds).digest() == calibration_set(artifact, list(feeds)).digest() is not None
    assert len(list(calibration_set(artifact, iter(feeds), 3).feeds(8))) == 3


def test_what_cannot_be_calibrated_on_is_refused_at_once(make, images, tmp_path):
    with pytest.raises(UsageError, match=r"\.npz"):
        calibration_set(make(("N", 2), ("N", 2)), images)
    with pytest.raises(UsageError, match="1 or more"):
        calibration_set(make(("N", 1, 4, 4)), images, 0)
    with pytest.raises(DataError, match="no folder"):
        calibration_set(make(("N", 1, 4, 4)), tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        calibration_set(make(("N", 1, 4, 4)), tmp_path / "empty")
