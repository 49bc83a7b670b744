import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from deploy.evaluation.evaluate import evaluate
from deploy.evaluation.iou import MeanIoU


def scored(pairs, classes=3, ignore=255) -> MeanIoU:
    metric = MeanIoU(classes, ignore)
    for predicted, mask in pairs:
        metric.update(np.array([predicted]), np.array([mask]))
    return metric


def test_the_mean_is_over_the_classes_of_all_images_and_pixels_to_ignore_count_for_nothing():
    metric = scored([([[0, 0], [1, 1]], [[0, 1], [1, 255]]), ([[1, 0], [0, 0]], [[0, 0], [0, 255]])])
    # class 0: 3 of 5, class 1: 1 of 3; class 2 is neither there nor predicted
    assert metric.compute() == pytest.approx(100 * (3 / 5 + 1 / 3) / 2)
    assert [(each.value, each.count) for each in metric.by_class()] == [(60, 4), (pytest.approx(100 / 3), 2), (None, 0)]
    assert [(each.actual, each.predicted, each.count) for each in metric.confusions()] == [("0", "1", 1), ("1", "0", 1)]


def test_it_is_that_of_torchmetrics(make_segmenter, scenes, tmp_path):
    artifact = make_segmenter(tmp_path / "net")
    found = evaluate(artifact, scenes, metric="miou", batch_size=4)
    from PIL import Image

    judge = MulticlassJaccardIndex(num_classes=3, ignore_index=255)
    for path in sorted((scenes / "images").iterdir()):
        pixels = np.asarray(Image.open(path), np.float32) / 255
        logits = np.stack([0 * pixels, 4 * pixels - 1, 8 * pixels - 4])
        judge.update(
            torch.from_numpy(logits.argmax(0))[None],
            torch.from_numpy(np.array(Image.open(scenes / "masks" / path.name)))[None].long(),
        )
    assert found.value / 100 == pytest.approx(float(judge.compute()), abs=1e-6)
    assert 50 < found.value < 100
    assert found.low < found.value < found.high
    assert found.images == 6


@pytest.mark.parametrize("ignore", [0, 2, 255])
def test_a_class_to_ignore_is_not_in_the_mean(ignore):
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 3, (4, 8, 8))
    predicted = np.where(rng.random(masks.shape) < 0.3, rng.integers(0, 3, masks.shape), masks)
    metric = scored(zip(predicted, masks, strict=True), ignore=ignore)
    judge = MulticlassJaccardIndex(num_classes=3, ignore_index=ignore)
    assert metric.compute() / 100 == pytest.approx(float(judge(torch.from_numpy(predicted), torch.from_numpy(masks))), abs=1e-6)
    assert [each.value is None for each in metric.by_class()] == [index == ignore for index in range(3)]


def test_the_interval_of_a_loss_is_of_the_same_images_and_none_is_lost_where_nothing_changed():
    rng = np.random.default_rng(3)
    masks = rng.integers(0, 3, (40, 8, 8))
    good = np.where(rng.random(masks.shape) < 0.1, 0, masks)
    worse = np.where(rng.random(masks.shape) < 0.05, 0, good)
    first, second, again = (scored(zip(each, masks, strict=True)) for each in (good, worse, good))
    assert again.loss_interval(first) == (0, 0)
    low, high = second.loss_interval(first)
    assert low < second.loss(first) < high
    alone_low, alone_high = second.interval()
    assert high - low < (alone_high - alone_low) * 0.9  # paired: what the images have in common is not counted
    assert second.images_to_decide(first, second.loss(first) + (high - second.loss(first)) / 2) == pytest.approx(120, abs=1)
