import numpy as np
import pytest
from onnx import TensorProto
from PIL import Image

from deploy.data.image_folder import image_feeds, read_folder
from deploy.errors import DataError, UsageError


@pytest.fixture
def folder(tmp_path):
    """Two classes of 4 x 4 images: shades 0 to 9 in `dark`, 100 to 109 in `light`."""
    for name, first in (("dark", 0), ("light", 100)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("L", (4, 4), first + index).save(tmp_path / "data" / name / f"{index}.png")
    return tmp_path / "data"


def shades(feeds) -> list[int]:
    return [int(image[0, 0, 0]) for feed in feeds for image in feed["x0"]]


def test_feeds_are_preprocessed_images_of_a_balanced_sample(tmp_path, folder, make_artifact):
    feeds = list(image_feeds(make_artifact(tmp_path, ("N", 1, 4, 4)), folder, batch_size=4, count=10, seed=3))
    assert [(list(feed), feed["x0"].shape, feed["x0"].dtype) for feed in feeds] == [
        (["x0"], (size, 1, 4, 4), np.float32) for size in (4, 4, 2)
    ]
    found = shades(feeds)
    assert len(set(found)) == 10
    assert sum(shade >= 100 for shade in found) == 5


def test_feeds_repeat_with_their_seed_whatever_the_batch_size(tmp_path, folder, make_artifact):
    artifact = make_artifact(tmp_path, ("N", 1, 4, 4))
    first, again, other = (
        shades(image_feeds(artifact, folder, batch_size=size, count=12, seed=seed)) for size, seed in ((4, 1), (5, 1), (4, 2))
    )
    assert first == again
    assert first != other


def test_more_images_than_there_are_is_all_of_them(tmp_path, folder, make_artifact):
    artifact = make_artifact(tmp_path, ("N", 1, 4, 4))
    assert sorted(shades(image_feeds(artifact, str(folder), batch_size=8, count=1000))) == [*range(10), *range(100, 110)]


def test_a_fixed_batch_is_always_full(tmp_path, folder, make_artifact):
    feeds = list(image_feeds(make_artifact(tmp_path, (3, 1, 4, 4)), folder, batch_size=8, count=4))
    assert [feed["x0"].shape[0] for feed in feeds] == [3, 3]
    assert len(set(shades(feeds[1:]))) == 1


def test_half_inputs_get_halves(tmp_path, folder, make_artifact):
    artifact = make_artifact(tmp_path, ("N", 1, 4, 4), dtype=TensorProto.FLOAT16)
    assert next(image_feeds(artifact, folder, batch_size=2, count=2))["x0"].dtype == np.float16


def test_images_of_many_sizes_go_one_by_one(tmp_path, folder, make_artifact):
    Image.new("L", (9, 5), 50).save(folder / "dark/odd.png")
    artifact = make_artifact(tmp_path, ("N", 1, "H", "W"))
    shapes = [feed["x0"].shape for feed in image_feeds(artifact, folder, batch_size=8, count=21)]
    assert sorted(shapes) == [(1, 1, 4, 4)] * 20 + [(1, 1, 5, 9)]


def test_images_that_a_fixed_batch_cannot_hold_together_are_named(tmp_path, folder, make_artifact):
    Image.new("L", (9, 5), 50).save(folder / "dark/odd.png")
    artifact = make_artifact(tmp_path, (21, 1, "H", "W"))
    with pytest.raises(DataError, match=r"odd\.png.*one size"):
        list(image_feeds(artifact, folder, batch_size=8, count=21))


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        ([("N", 1, 4, 4), ("N", 1, 4, 4)], TensorProto.FLOAT, "takes x0: float32 Nx1x4x4, x1: float32 Nx1x4x4; images can"),
        ([("N", 100)], TensorProto.FLOAT, "takes x0: float32 Nx100; images can be fed to a model with one input of four"),
        ([("N", 1, 4, 4)], TensorProto.INT64, "takes x0: int64"),
    ],
)
def test_a_model_that_takes_no_images_is_refused_at_once(tmp_path, folder, shapes, dtype, message, make_artifact):
    with pytest.raises(UsageError, match=message):
        image_feeds(make_artifact(tmp_path, *shapes, dtype=dtype), folder, batch_size=2, count=2)


def test_a_model_without_preprocessing_is_refused_at_once(tmp_path, folder, make_artifact):
    with pytest.raises(UsageError, match="does not say how images become its input; export it with --preprocess"):
        image_feeds(make_artifact(tmp_path, ("N", 1, 4, 4), preprocess=None), folder, batch_size=2, count=2)


def test_preprocessing_that_does_not_fit_the_input_is_refused(tmp_path, folder, make_artifact):
    with pytest.raises(UsageError, match=r"makes 1x4x4 of .*; the model takes x0: float32 Nx3x4x4: export it"):
        list(image_feeds(make_artifact(tmp_path, ("N", 3, 4, 4)), folder, batch_size=2, count=2))


@pytest.mark.parametrize("option", ["batch_size", "count"])
def test_counts_must_be_positive(tmp_path, folder, option, make_artifact):
    with pytest.raises(UsageError, match="must be 1 or more, not 0"):
        image_feeds(make_artifact(tmp_path, ("N", 1, 4, 4)), folder, **({"batch_size": 1, "count": 1} | {option: 0}))


def test_a_corrupt_image_is_named(tmp_path, folder, make_artifact):
    (folder / "light/3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"light/3\.png"):
        list(image_feeds(make_artifact(tmp_path, ("N", 1, 4, 4)), folder, batch_size=2, count=20))


def test_a_folder_without_class_folders_is_a_data_error(folder):
    with pytest.raises(DataError, match="images must lie in one folder a class"):
        read_folder(folder / "dark")
