import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import UsageError
from deploy.evaluation.evaluate import evaluate
from deploy.evaluation.fidelity import Cosine, Sqnr


def filled(metric, pairs):
    for actual, expected in pairs:
        metric.update({"y": np.array([actual], np.float32)}, {"y": np.array([expected], np.float32)})
    return metric


def test_the_two_are_those_of_their_definitions_and_the_worst_output_counts():
    pairs = [([3.0, 4.1], [3, 4]), ([0.0, 2.0], [0, 2.2])]
    assert filled(Sqnr(), pairs).compute() == pytest.approx(10 * np.log10((9 + 16 + 2.2**2) / (0.1**2 + 0.2**2)), rel=1e-5)
    cosine = (3 * 3 + 4.1 * 4) / (np.hypot(3, 4.1) * 5)
    assert filled(Cosine(), pairs).compute() == pytest.approx((cosine + 1) / 2)
    both = Sqnr()
    both.update({"a": np.ones((2, 3)), "b": np.ones((2, 3))}, {"a": np.full((2, 3), 1.1), "b": np.full((2, 3), 1.5)})
    assert both.compute() == pytest.approx(10 * np.log10(1.5**2 / 0.5**2))


def test_outputs_without_any_difference_are_infinitely_good():
    metric = filled(Sqnr(), [([1.0, 2.0], [1, 2])])
    assert metric.compute() == float("inf")
    assert metric.interval() is None


def test_any_images_will_do_and_the_parent_is_compared_with(shared_lenet5: Artifact, paint, tmp_path):
    for level in range(0, 256, 25):
        digits = paint(tmp_path / "loose" / f"{level}.png", level, (28, 28)).parent
    half = deploy.convert(shared_lenet5, tmp_path / "half", precision="fp16")
    found = evaluate(half, digits, metric="sqnr", batch_size=7)
    assert (found.metric, found.unit, found.top1) == ("sqnr", "dB", None)
    assert 40 < found.value < 100
    assert found.low <= found.value <= found.high
    assert evaluate(half, digits, metric="cosine").value == pytest.approx(1, abs=1e-4)
    assert evaluate(half, digits, metric="sqnr", against=half).to_json()["value"] is None
    with pytest.raises(UsageError, match="has no FP32 artifact that it was made from: name what to compare with, `against`"):
        evaluate(shared_lenet5, digits, metric="sqnr")
