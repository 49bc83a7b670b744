import json

import pytest
from PIL import Image

from deploy.data.coco import class_of_category, find_coco, read_coco
from deploy.errors import DataError


def written(folder, place="boxes.json", pictures="images", **changes):
    """A COCO JSON of two pictures of 40x30 pixels, one with two boxes."""
    document = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 10, 20], "area": 150, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        ],
        **changes,
    }
    path = folder / place
    for parent in (path.parent, folder / pictures):
        parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(folder / pictures / name)
    return path


@pytest.mark.parametrize(
    ("place", "images"),
    [("boxes.json", "images"), ("boxes.json", "."), ("annotations/instances_val2017.json", "val2017")],
)
def test_pictures_are_found_beside_the_file_and_in_cocos_own_layout(tmp_path, place, images):
    found = read_coco(written(tmp_path, place, images))
    first, second = found.pictures
    assert (first.path.name, first.width, first.height, second.path.name) == ("a.png", 40, 30, "b.png")
    assert first.boxes.boxes.tolist() == [[1, 2, 11, 22], [0, 0, 40, 30]]
    assert (first.boxes.labels.tolist(), first.boxes.areas.tolist(), first.boxes.crowd.tolist()) == (
        [5, 2],
        [150, 1200],
        [False, True],
    )
    assert second.boxes.boxes.shape == (0, 4)
    assert found.categories == {2: "cat", 5: "dog"}


def test_categories_are_paired_with_classes_by_name_else_in_the_order_of_their_ids(tmp_path):
    found = read_coco(written(tmp_path))
    assert class_of_category(found, ["bird", "cat", "dog"], "net") == {2: 1, 5: 2}
    assert class_of_category(found, None, "net") == {2: 0, 5: 1}
    with pytest.raises(
        DataError, match=r"has the category 'cat' \(and 1 more\), which is no class of net; it has 1 class: 'bird'"
    ):
        class_of_category(found, ["bird"], "net")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": 1, "file_name": "other.png"}], "annotations": []}, r"is of other images: none of its 1 files, such as 'other\.png'"),
        ({"images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "c.png"}]}, r"lists c\.png, which is not in"),
        ({"images": [{"id": 7, "file_name": "a.png", "width": 64, "height": 30}]}, r"says that a\.png has 64x30 pixels, and .* has 40x30"),
        ({"images": [{"id": 9, "file_name": "b.png"}]}, "annotation 0 is of the image 7, which it does not list"),
        ({"categories": [{"id": 2, "name": "cat"}]}, "annotation 0 is of the category 5, which it does not list"),
        ({"annotations": []}, "has no annotations"),
        ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, -3, 4]}]}, "expected x, y, width, height"),
        ({"annotations": [{"image_id": 7}]}, "expected a COCO JSON.*KeyError: 'category_id'"),
        ({"categories": None}, "expected a COCO JSON"),
        ({"images": [{"id": 7, "file_name": "a.png"}] * 2}, "two images of one id"),
    ],
)  # fmt: skip
def test_a_file_that_is_damaged_or_of_other_images_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_coco(written(tmp_path, **changes))


def test_the_only_json_of_a_folder_is_found(tmp_path):
    path = written(tmp_path)
    assert find_coco(path) == find_coco(tmp_path) == path
    (tmp_path / "other.json").write_text("{}")
    assert find_coco(tmp_path) is None
    (tmp_path / "other.json").write_text("no json")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_coco(tmp_path / "other.json")
