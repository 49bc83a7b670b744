import numpy as np
from PIL import Image

from deploy.artifact.decode import Detections
from deploy.evaluation.pictures import PALETTE, boxed, mask_image, overlaid, png


def test_the_palette_is_that_of_pascal_voc():
    assert PALETTE[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert PALETTE[15].tolist() == [192, 128, 128]
    assert len(np.unique(PALETTE, axis=0)) == 256


def test_a_mask_of_many_classes_keeps_its_numbers():
    classes = np.array([[0, 300], [7, 255]])
    np.testing.assert_array_equal(np.asarray(mask_image(classes)), classes)
    assert mask_image(classes % 256).mode == "P"
    assert png(mask_image(classes)).startswith(b"\x89PNG")


def test_an_overlay_colours_what_is_no_ground_and_was_seen():
    image = Image.new("RGB", (3, 1), (100, 100, 100))
    found = np.asarray(overlaid(image, np.array([[0, 1, 255]])))
    assert found[0, 0].tolist() == found[0, 2].tolist() == [100, 100, 100]
    assert found[0, 1, 0] > found[0, 1, 1]


def test_a_box_keeps_what_is_in_it_and_one_at_the_edge_is_drawn_too():
    image = Image.new("RGB", (120, 120))
    found = Detections(np.array([[20, 50, 80, 100], [-5, -5, 200, 200]], np.float32), np.array([0.9, 0.5]), np.array([0, 7]))
    drawn = np.asarray(boxed(image, found, ["cat"]))
    assert (drawn[60:95, 25:75] == 0).all()
    assert drawn[50, 79].any()
    assert drawn[99, 50].any()
    assert not np.asarray(image).any()  # the image itself is as it was
