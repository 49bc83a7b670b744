import numpy as np
import pytest

from deploy.evaluation.metric import Confusion
from deploy.evaluation.topk import TopK, ranks


def test_ranks_count_what_comes_before_the_right_class():
    logits = np.array([[3, 1, 2], [3, 1, 2], [3, 1, 2], [5, 5, 5], [5, 5, 5]], dtype=np.float32)
    np.testing.assert_array_equal(ranks(logits, np.array([0, 1, 2, 0, 2])), [0, 2, 1, 0, 2])


def test_a_nan_is_never_right():
    nan = float("nan")
    np.testing.assert_array_equal(ranks(np.array([[nan, 1], [nan, nan], [1, nan]]), np.array([0, 1, 0])), [2, 2, 1])


def scored(k: int, logits: list[list[float]], labels: list[int]) -> TopK:
    metric = TopK(k, ["ant", "bee", "cat"])
    metric.update(np.array(logits), np.array(labels))
    return metric


def test_the_score_of_each_class_and_the_confusions_are_counted():
    metric = scored(1, [[3, 1, 0], [0, 3, 1], [0, 3, 1], [0, 3, 1]], [0, 0, 0, 1])
    assert metric.compute() == 50
    assert [(each.name, each.value, each.count) for each in metric.by_class()] == [
        ("ant", pytest.approx(100 / 3), 3), ("bee", 100, 1), ("cat", None, 0)
    ]  # fmt: skip
    assert metric.confusions() == [Confusion(actual="ant", predicted="bee", count=2)]


def test_the_loss_is_that_of_the_same_images_and_says_how_many_more_would_decide():
    same = [[3.0, 1, 0]] * 20
    before, after = scored(1, same, [0] * 20), scored(1, [*same[:19], [0.0, 3, 1]], [0] * 20)
    assert after.loss(before) == 5
    low, high = after.loss_interval(before)
    assert low < 5 < high
    more = before.images_to_decide(before, 1.0)
    assert more is not None
    many = scored(1, [[3.0, 1, 0]] * (20 + more), [0] * (20 + more))
    assert many.loss_interval(many).high <= 1.0
    fewer = scored(1, [[3.0, 1, 0]] * (19 + more), [0] * (19 + more))
    assert fewer.loss_interval(fewer).high > 1.0
    assert after.images_to_decide(before, 5.0) is None


def test_top_5_of_three_classes_is_all_of_them():
    assert scored(5, [[3, 1, 0], [3, 1, 0]], [2, 1]).compute() == 100
