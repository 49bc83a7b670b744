import json

import numpy as np
import pytest

from deploy.errors import DataError, UsageError
from deploy.evaluation.predict import predict

SHARPNESS = 100.0
"""That of `make_model`."""


def test_a_prediction_names_the_likeliest_classes_with_probabilities(model, tmp_path, paint, shade):
    image = paint(tmp_path / "grey.png", shade(2))
    (found,) = predict(model, [image], top=3)
    assert found.path == image
    assert found.classes[0][0] == "cat"
    assert {name for name, _ in found.classes} == {"bee", "cat", "dog"}
    mean = np.float64(shade(2)) / 255
    powers = np.exp(-SHARPNESS * (mean - np.arange(7) / 6) ** 2)
    expected = sorted(powers / powers.sum(), reverse=True)[:3]
    assert [probability for _, probability in found.classes] == pytest.approx(expected, rel=1e-4)
    assert json.loads(json.dumps(found.to_json()))["classes"][0] == {"class": "cat", "probability": pytest.approx(expected[0])}


def test_directories_stand_for_the_images_in_them_and_the_order_is_kept(model, tmp_path, paint, shade):
    last = paint(tmp_path / "zz.png", shade(6))
    first = [paint(tmp_path / "many" / name, shade(label)) for label, name in enumerate(["a.png", "b.png", "deep/c.png"])]
    (tmp_path / "many/notes.txt").write_text("not an image")
    found = predict(model, [last, tmp_path / "many", str(last)], batch_size=2)
    assert [prediction.path for prediction in found] == [last, *first, last]
    assert [prediction.classes[0][0] for prediction in found] == ["gnu", "ant", "bee", "cat", "gnu"]


def test_a_class_without_a_name_is_called_by_its_index(tmp_path, make_model, paint, shade):
    nameless = make_model(tmp_path / "nameless", names=None)
    (found,) = predict(nameless, [paint(tmp_path / "x.png", shade(5))], top=100)
    assert found.classes[0][0] == "5"
    assert sorted(name for name, _ in found.classes) == [str(index) for index in range(7)]
    assert sum(probability for _, probability in found.classes) == pytest.approx(1)


@pytest.mark.parametrize(("paths", "message"), [(["gone.png"], "no image at"), (["."], "holds no images")])
def test_what_holds_no_image_is_named(model, tmp_path, paths, message):
    with pytest.raises(DataError, match=message):
        predict(model, [tmp_path / path for path in paths])


def test_predict_needs_an_image_and_a_positive_top(model, tmp_path, paint):
    with pytest.raises(UsageError, match="no image to predict"):
        predict(model, [])
    with pytest.raises(UsageError, match="top must be 1 or more"):
        predict(model, [paint(tmp_path / "x.png", 0)], top=0)
