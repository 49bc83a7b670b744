import numpy as np
import pytest
from PIL import Image

from deploy.data.masks import check_masks, read_mask, read_pairs
from deploy.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for name, value in (("a", 0), ("b", 2)):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / kind / "deep").mkdir(parents=True, exist_ok=True)
            Image.new(mode, (6, 4), value if mode == "L" else 0).save(tmp_path / kind / "deep" / f"{name}.png")
    return tmp_path


def test_images_are_paired_with_masks_of_their_name(folder):
    (folder / "images/deep/b.png").rename(folder / "images/deep/b.jpg")
    pairs = [(image.name, mask.name) for image, mask in read_pairs(folder)]
    assert pairs == [("a.png", "a.png"), ("b.jpg", "b.png")]
    check_masks(read_pairs(folder), 3, 255)


def test_an_image_without_a_mask_and_a_mask_without_an_image_are_named(folder):
    (folder / "masks/deep/b.png").rename(folder / "masks/deep/c.png")
    with pytest.raises(DataError, match=r"images/deep/b\.png has no mask: expected .*masks/deep/b\.png"):
        read_pairs(folder)
    (folder / "images/deep/b.png").unlink()
    with pytest.raises(DataError, match=r"masks/deep/c\.png has no image"):
        read_pairs(folder)


def test_a_mask_of_another_size_is_named_with_both_sizes(folder):
    Image.new("L", (6, 5)).save(folder / "masks/deep/b.png")
    with pytest.raises(DataError, match=r"b\.png has 6x5 pixels, and .*b\.png 6x4"):
        check_masks(read_pairs(folder), 3, 255)


def test_a_value_that_is_no_class_is_named_unless_it_is_to_be_ignored(folder):
    with pytest.raises(DataError, match=r"b\.png has the value 2; expected the indices of 2 classes, 0 to 1, and 255"):
        check_masks(read_pairs(folder), 2, 255)
    check_masks(read_pairs(folder), 2, 2)


def test_indices_are_read_without_the_palette_and_with_16_bits(tmp_path):
    indices = np.array([[0, 1], [2, 3]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(tmp_path / "palette.png")
    Image.fromarray(indices.astype(np.uint16) * 300).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(np.asarray(read_mask(tmp_path / "palette.png")), indices)
    np.testing.assert_array_equal(np.asarray(read_mask(tmp_path / "wide.png")), indices.astype(int) * 300)
    Image.new("RGB", (2, 2)).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match=r"colour\.png is a picture of mode RGB; expected a PNG of class indices"):
        read_mask(tmp_path / "colour.png")
