import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deploy.artifact.decode import Detections
from deploy.data.coco import Boxes
from deploy.evaluation.coco import MeanAveragePrecision
from deploy.evaluation.evaluate import evaluate
from deploy.evaluation.predict import predict


def own_evaluation(path, found) -> float:
    """mAP by pycocotools' own evaluation of a result file, in per cent."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        done = COCOeval(truth, truth.loadRes(found), "bbox")
        done.evaluate()
        done.accumulate()
        done.summarize()
    return 100 * float(done.stats[0])


def test_it_is_that_of_pycocotools_on_the_same_boxes(make_detector, boxes, tmp_path):
    artifact = make_detector(tmp_path / "net", names=["grey", "bright"])
    found = evaluate(artifact, boxes, metric="map", batch_size=3)
    images = {each["file_name"]: each["id"] for each in json.loads(boxes.read_text())["images"]}
    rows = [
        {"image_id": images[each.path.name], "category_id": {"grey": 3, "bright": 8}[name], "score": score,
         "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for each in predict(artifact, boxes.parent / "images", min_score=0.001)
        for name, score, (x1, y1, x2, y2) in each.boxes
    ]  # fmt: skip
    assert found.value == pytest.approx(own_evaluation(boxes, rows), abs=1e-9)
    assert 10 < found.value < 90
    assert found.low <= found.value <= found.high
    assert [each.name for each in found.classes] == ["grey", "bright"]
    assert np.mean([each.value for each in found.classes]) == pytest.approx(found.value)


def test_boxes_are_decoded_as_by_hand_on_three_images(make_detector, boxes, tmp_path):
    """The picture is 32x16, the array 16x16: a quarter of the array is 16x8 pixels of the picture."""
    artifact = make_detector(tmp_path / "net", names=["grey", "bright"])
    from PIL import Image

    for index in range(3):
        path = boxes.parent / "images" / f"{index}.png"
        pixels = np.asarray(Image.open(path))
        wanted = []
        for row, column in np.ndindex(2, 2):
            level = int(pixels[8 * row, 16 * column])
            if level > 10:
                wanted.append(
                    ("grey" if level == 110 else "bright", (16.0 * column, 8.0 * row, 16.0 * column + 16, 8.0 * row + 8))
                )
        (found,) = predict(artifact, path, min_score=0.5)
        assert sorted((name, box) for name, _, box in found.boxes) == sorted(wanted)


def random_case(seed: int, images: int = 12):
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        count = int(rng.integers(0, 4))
        corner = rng.uniform(0, 50, (count, 2))
        sides = rng.uniform(10, 40, (count, 2))
        corners = np.concatenate([corner, corner + sides], axis=1)
        labels = rng.integers(0, 2, count)
        truth.append(Boxes(corners, labels, sides.prod(axis=1), np.zeros(count, bool)))
        moved = (corners + rng.normal(0, 3, corners.shape)).astype(np.float32)
        extra = rng.uniform(0, 50, (1, 4)).astype(np.float32)
        extra[:, 2:] += extra[:, :2]
        scores = np.concatenate([rng.uniform(0.3, 1, count), rng.uniform(0, 0.6, 1)]).astype(np.float32)
        found.append(Detections(np.concatenate([moved, extra]), scores, np.concatenate([labels, [0]])))
    return truth, found


def measured(truth, found) -> MeanAveragePrecision:
    metric = MeanAveragePrecision([0, 1], ["a", "b"])
    metric.update(found, truth)
    return metric


def test_a_resample_has_the_score_of_the_images_that_it_drew():
    from deploy.evaluation.coco import _mean_precision, _Table

    truth, found = random_case(0)
    metric = measured(truth, found)
    done = metric._evaluated()
    tables = [_Table(done, place, 12) for place in range(2)]
    whole = _mean_precision(tables, np.ones(12), done.params.recThrs)
    assert 100 * whole == pytest.approx(metric.compute(), abs=1e-9)
    weights = np.array([2, 0, 1, 0, 0, 3, 1, 1, 2, 0, 1, 1], float)
    drawn = [index for index, times in enumerate(weights) for _ in range(int(times))]
    again = measured([truth[index] for index in drawn], [found[index] for index in drawn])
    assert 100 * _mean_precision(tables, weights, done.params.recThrs) == pytest.approx(again.compute(), abs=1e-6)


def test_nothing_is_lost_where_nothing_changed_and_what_is_lost_has_an_interval():
    truth, found = random_case(1)
    first, same = measured(truth, found), measured(truth, found)
    assert same.loss_interval(first) == (0, 0)
    worse = measured(truth, [each._replace(boxes=each.boxes + np.float32(2)) for each in found])
    low, high = worse.loss_interval(first)
    assert low < worse.loss(first) < high
    assert worse.loss(first) > 0
