import numpy as np
import pytest
from PIL import Image

from deploy.data.calibration_set import calibration_set
from deploy.data.npz_folder import holds_npz, read_npz, read_npz_folder
from deploy.errors import DataError


def save(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def test_feeds_lie_in_the_folder_or_in_class_folders_and_images_are_none(tmp_path):
    save(tmp_path / "flat" / "0.npz", x0=np.zeros(2))
    save(tmp_path / "classes" / "b" / "deep" / "0.npz", x0=np.zeros(2))
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "images" / "a" / "0.png")
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    assert [holds_npz(tmp_path / name) for name in ("flat", "classes", "images", "gone")] == [True, True, False, False]
    assert read_npz_folder(tmp_path / "flat").classes is None
    assert read_npz_folder(tmp_path / "classes").classes == ("b",)


def test_a_class_folder_without_feeds_is_named(tmp_path):
    save(tmp_path / "a" / "0.npz", x0=np.zeros(2))
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"has class folders without \.npz files: b; add \.npz files"):
        read_npz_folder(tmp_path)


def test_calibration_draws_feeds_evenly_over_the_classes(tmp_path, make_artifact):
    for index in range(10):
        save(tmp_path / "data" / "a" / f"{index}.npz", x0=np.float32([index, 0]))
        save(tmp_path / "data" / "b" / f"{index}.npz", x0=np.float32([index, 1]))
    data = calibration_set(make_artifact(tmp_path, ("N", 2)), tmp_path / "data", 6)
    assert [feed["x0"].shape for feed in data.feeds(4)] == [(1, 2)] * 6
    assert sum(float(feed["x0"][0, 1]) for feed in data.feeds(4)) == 3


def test_labels_are_no_input_unless_one_is_called_so(tmp_path, make_artifact):
    specs = make_artifact(tmp_path, ("N", 2)).manifest.inputs
    save(tmp_path / "data" / "0.npz", x0=np.zeros((3, 2), np.float32), label=[2, 0, 1])
    arrays, labels = read_npz(tmp_path / "data" / "0.npz", specs)
    assert list(arrays) == ["x0"]
    assert labels is not None
    assert labels.tolist() == [2, 0, 1]
    assert len(list(calibration_set(make_artifact(tmp_path, ("N", 2)), tmp_path / "data").feeds(8))) == 1
    save(tmp_path / "data" / "0.npz", label=np.zeros((3, 2), np.float32))
    renamed = [type(specs[0])(name="label", dtype="float32", shape=("N", 2))]
    assert read_npz(tmp_path / "data" / "0.npz", renamed)[1] is None
