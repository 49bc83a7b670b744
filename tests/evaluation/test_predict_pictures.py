import json

import numpy as np
import pytest
from PIL import Image

from deploy.artifact.image_ops import picture_size
from deploy.errors import OutputError, UsageError
from deploy.evaluation.pictures import PALETTE
from deploy.evaluation.predict import predict


def test_a_segmenter_writes_masks_of_class_indices_in_the_size_of_the_pictures(make_segmenter, scenes, tmp_path):
    artifact = make_segmenter(tmp_path / "net", names=["dark", "grey", "bright"])
    made = predict(artifact, scenes / "images", out=tmp_path / "out", batch_size=4)
    assert [each.picture for each in made] == [tmp_path / "out" / f"{index}.png" for index in range(6)]
    for each in made:
        pixels = np.asarray(Image.open(each.path))
        wanted = np.select([pixels == 20, pixels == 100], [0, 1], 2)
        mask = Image.open(each.picture)
        np.testing.assert_array_equal(np.asarray(mask), wanted)
        assert mask.mode == "P"
        assert tuple(mask.convert("RGB").getpixel((0, 0))) == tuple(PALETTE[wanted[0, 0]])
        assert sum(share for _, share in each.classes) == pytest.approx(1)
        assert dict(each.classes)["dark"] == pytest.approx((wanted == 0).mean())
    (alone,) = predict(artifact, made[0].path)
    np.testing.assert_array_equal(alone.mask, np.asarray(Image.open(made[0].picture)))
    assert json.loads(json.dumps(alone.to_json()))["classes"][0]["share"] == alone.classes[0][1]


def test_a_detector_draws_its_boxes_where_they_are(make_detector, boxes, tmp_path):
    artifact = make_detector(tmp_path / "net", names=["grey", "bright"])
    made = predict(artifact, boxes.parent / "images", out=tmp_path / "out", min_score=0.5)
    assert {picture_size(each.picture)[:2] for each in made} == {(32, 16)}
    found = next(each for each in made if any(box[:2] == (16.0, 8.0) for _, _, box in each.boxes))
    before, after = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (found.path, found.picture))
    assert (before[15, 16:32] != after[15, 16:32]).any(axis=-1).all()  # the lower edge of the lower right quarter
    name, score, box = found.boxes[0]
    assert found.to_json()["boxes"][0] == {"class": name, "score": score, "box": list(box)}
    assert 0.5 <= score <= 1
    assert all(not each.boxes for each in predict(artifact, boxes.parent / "images", min_score=1))


def test_pictures_never_replace_an_image_or_one_another(make_segmenter, scenes, model, tmp_path):
    artifact = make_segmenter(tmp_path / "net")
    with pytest.raises(UsageError, match=r"the picture of .*0\.png would replace .*images/0\.png"):
        predict(artifact, scenes / "images", out=scenes / "images")
    with pytest.raises(UsageError, match="would be one file"):
        predict(artifact, [scenes / "images/0.png", scenes / "masks/0.png"], out=tmp_path / "out")
    with pytest.raises(OutputError, match="is not a directory"):
        predict(artifact, scenes / "images", out=scenes / "images/0.png")
    with pytest.raises(UsageError, match="is a classifier, and there are no pictures"):
        predict(model, scenes / "images", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
