import numpy as np
import pytest
from PIL import Image

from deploy.artifact.preprocess import Preprocess

CASES = [
    {},
    {"resize": 24},
    {"resize": (20, 44)},
    {"resize": 24, "crop": 16},
    {"resize": (40, 40), "resize_mode": "letterbox"},
    {"resize": (40, 64), "resize_mode": "letterbox", "position": "top-left"},
    {"crop": (50, 40)},
    {"resize": (64, 48), "resize_mode": "letterbox", "crop": 32},
]


def marked(width: int, height: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A black picture with a white box, and the corners of the box."""
    box = (width // 3, height // 3, 2 * width // 3, 2 * height // 3)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(pixels), box


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (48, 30), (31, 57)], ids=str)
def test_a_box_that_is_seen_in_the_array_is_brought_back_to_the_pixels_of_the_picture(options, size):
    picture, box = marked(*size)
    preprocess = Preprocess(**options, interpolation="nearest")
    seen = preprocess(picture).mean(axis=0) > 0.5
    rows, columns = np.nonzero(seen)
    in_array = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float32)
    placement = preprocess.placement(*size)
    assert seen.shape == (placement.input_height, placement.input_width)
    (found,) = placement.boxes_to_picture(in_array)
    pixel = 1.01 / min(placement.scale_x, placement.scale_y, 1)
    inside = [
        max(box[0], -placement.left / placement.scale_x), max(box[1], -placement.top / placement.scale_y),
        min(box[2], (placement.input_width - placement.left) / placement.scale_x),
        min(box[3], (placement.input_height - placement.top) / placement.scale_y),
    ]  # fmt: skip
    np.testing.assert_allclose(found, inside, atol=pixel)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_mask_follows_its_image_there_and_back(options):
    picture, _ = marked(48, 30)
    preprocess = Preprocess(**options, interpolation="nearest")
    mask = Image.fromarray((np.asarray(picture)[..., 0] > 0).astype(np.uint8))
    classes = preprocess.mask(mask, 255)
    np.testing.assert_array_equal(classes == 1, preprocess(picture)[0] > 0.5)
    placement = preprocess.placement(48, 30)
    back = placement.map_to_picture(classes, 255)
    assert back.shape == (30, 48)
    seen = back != 255
    original = np.asarray(mask)
    assert (back[seen] == original[seen]).mean() > 0.93  # but for the pixels at the edge of what was enlarged or reduced
    assert seen.any()


def test_a_map_of_a_coarser_grid_is_spread_over_the_picture_and_what_was_cut_off_is_said():
    placement = Preprocess(crop=(4, 4)).placement(8, 4)
    found = placement.map_to_picture(np.array([[1, 2], [3, 4]]), 255)
    assert found[0].tolist() == [255, 255, 1, 1, 2, 2, 255, 255]
    assert found[3].tolist() == [255, 255, 3, 3, 4, 4, 255, 255]


def test_boxes_end_at_the_edges_of_the_picture():
    placement = Preprocess(resize=(10, 10)).placement(20, 40)
    np.testing.assert_array_equal(placement.boxes_to_picture(np.array([[-3.0, 1, 5, 99]])), [[0, 4, 10, 40]])
