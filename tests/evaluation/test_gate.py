import dataclasses

import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Accuracy
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.summary import accuracy_text
from deploy.errors import AccuracyError, UsageError
from deploy.evaluation.gate import Expected, Gate, Reference, check_expected
from deploy.evaluation.options import MetricOptions
from deploy.evidence.parity import TOLERANCES
from deploy.progress import silent


def test_a_limit_outside_0_to_100_points_is_refused(tmp_path):
    with pytest.raises(UsageError, match="`max_drop` must be 0 to 100 points"):
        Gate(folder=tmp_path, max_drop=-1)


@pytest.mark.parametrize("top1", [0.842, 1, 0, -3, 100.5, float("nan")])
def test_an_expected_accuracy_that_is_no_percentage_is_refused(tmp_path, top1):
    with pytest.raises(UsageError, match="`expect_top1` is in per cent"):
        Expected(folder=tmp_path, top1=top1)


def test_an_export_must_reach_what_training_reported_within_its_interval(model, tmp_path, make_folder, caplog):
    folder = make_folder(tmp_path, ant=[0] * 16, bee=[2] * 4)  # 80 % of 20: 58.40 to 91.93
    for top1 in (None, 58.5, 80, 91.9):
        found = check_expected(model, Expected(folder=folder, top1=top1), silent)
        assert (found.top1, found.expected_top1, found.images, found.parent_top1) == (80, top1, 20, None)
        assert (found.top1_low, found.top1_high) == pytest.approx((58.40, 91.93), abs=0.005)
    assert caplog.text == ""
    check_expected(model, Expected(folder=folder, top1=58.3), silent)
    assert "training reported 58.3 %, which is less" in caplog.text
    with pytest.raises(
        AccuracyError, match=r"top-1 80\.00 % of 20 images .* \(95 % interval 58\.40 to 91\.93\), and training reported 92 %"
    ):
        check_expected(model, Expected(folder=folder, top1=92), silent)


def test_all_right_is_what_training_reported_as_all_right(model, tmp_path, make_folder):
    check_expected(model, Expected(folder=make_folder(tmp_path, ant=[0], bee=[1]), top1=100), silent)


@pytest.mark.parametrize("wrong", [{"scale": 1 / 510}, {"mean": (0.5,)}, {"resize": (8, 8), "crop": 16}], ids=str)
def test_preprocessing_that_is_not_that_of_the_training_is_noticed_and_shown(tmp_path, make_model, make_folder, wrong):
    folder = make_folder(tmp_path / "data", ant=[0] * 4, cat=[2] * 4, emu=[4] * 4, gnu=[6] * 4)
    right = {"channels": 1, "crop": 8}
    good = make_model(tmp_path / "good", preprocess=Preprocess(**right), shape=("batch", 1, "H", "W"))
    assert check_expected(good, Expected(folder=folder, top1=100), silent).top1 == 100
    bad = make_model(tmp_path / "bad", preprocess=Preprocess(**{**right, **wrong}), shape=("batch", 1, "H", "W"))
    with pytest.raises(AccuracyError, match=f"its preprocessing: .*{next(iter(wrong))} "):
        check_expected(bad, Expected(folder=folder, top1=100), silent)


def judged(before: Artifact, after: Artifact, gate: Gate) -> list[Accuracy]:
    return Reference(before, gate, silent).check(after, "a hint")


def test_a_loss_beyond_the_limit_fails_one_within_it_passes_and_between_it_is_undecided(make_segmenter, scenes, tmp_path):
    good, worse = make_segmenter(tmp_path / "good"), make_segmenter(tmp_path / "worse", noise=0.6)
    miou = MetricOptions(metric="miou")
    (found, *_) = judged(good, worse, Gate(folder=scenes, max_drop=100, metric=miou))
    score = found.score
    assert (score.metric, score.unit, found.top1, found.undecided) == ("miou", "%", None, None)
    assert score.loss == pytest.approx(score.parent - score.value)
    assert score.loss_low < score.loss < score.loss_high < 100
    with pytest.raises(
        AccuracyError,
        match=r"loses .* points of miou on .*scenes .*95 % interval .*; at most 0\.5 are allowed\. Nothing was written;\na hint",
    ):
        judged(good, worse, Gate(folder=scenes, max_drop=0.5, metric=miou))
    between = Gate(folder=scenes, max_drop=(score.loss + score.loss_high) / 2, metric=miou, backend="onnxruntime")
    (found,) = judged(good, worse, between)
    assert found.undecided == pytest.approx(18, abs=1)  # the width must be halved: four times six images
    with pytest.raises(AccuracyError, match=r"which these images do not show: 18 more images would decide \(`certify`\)"):
        judged(good, worse, dataclasses.replace(between, certify=True))


def test_a_net_that_loses_nothing_passes_also_where_the_images_are_too_few_to_be_sure(model, tmp_path, make_folder):
    folder = make_folder(tmp_path, ant=[0] * 10, bee=[1] * 10)
    gate = Gate(folder=folder, backend="onnxruntime")
    (found,) = judged(model, model, gate)
    assert (found.top1_drop, found.max_drop) == (0, 1)
    assert 200 < found.undecided < 400
    assert found.judged.loss_high > 1
    assert "; undecided: about" in accuracy_text(found)
    with pytest.raises(AccuracyError, match="loses no points of top-1 accuracy"):
        judged(model, model, dataclasses.replace(gate, certify=True))


def test_map_is_gated_too(make_detector, boxes, tmp_path):
    names = ["grey", "bright"]
    good, worse = make_detector(tmp_path / "good", names=names), make_detector(tmp_path / "worse", names=names, shift=30)
    gate = Gate(folder=boxes, metric=MetricOptions(metric="map"), backend="onnxruntime")
    (found,) = judged(good, good, gate)
    assert (found.score.loss, found.score.loss_low, found.score.loss_high, found.undecided) == (0, 0, 0, None)
    with pytest.raises(AccuracyError, match="points of map"):
        judged(good, worse, gate)


def test_a_metric_of_the_users_has_a_limit_in_its_own_unit_and_less_may_be_better(make_segmenter, scenes, tmp_path):
    (tmp_path / "own.py").write_text(
        "import numpy as np\nclass Wrong:\n    wrong = count = 0\n    def update(self, outputs, targets):\n"
        "        seen = targets != 255\n        self.wrong += int((outputs.argmax(1) != targets)[seen].sum())\n"
        "        self.count += int(seen.sum())\n    def compute(self):\n        return self.wrong / self.count\n"
    )
    metric = MetricOptions(metric=f"lower:{tmp_path}/own.py:Wrong")
    good, worse = make_segmenter(tmp_path / "good"), make_segmenter(tmp_path / "worse", noise=0.6)
    with pytest.raises(UsageError, match=r"say how much of lower:.* may be lost, in its own unit: `max_drop`"):
        Gate(folder=scenes, metric=metric)
    gate = Gate(folder=scenes, metric=metric, max_drop=0.9, backend="onnxruntime")
    (found,) = judged(good, worse, gate)
    assert found.score.loss == pytest.approx(found.score.value - found.score.parent)
    assert found.score.loss > 0.02
    assert judged(worse, good, dataclasses.replace(gate, max_drop=0))[0].score.loss < 0
    with pytest.raises(AccuracyError, match=r"loses 0\.\d+ of lower:"):
        judged(good, worse, dataclasses.replace(gate, max_drop=0.01))


def test_sqnr_is_held_to_the_limit_of_parity(make_segmenter, scenes, tmp_path):
    good, worse = make_segmenter(tmp_path / "good"), make_segmenter(tmp_path / "worse", noise=0.1)
    gate = Gate(folder=scenes, metric=MetricOptions(metric="sqnr"), backend="onnxruntime")
    assert gate.limit == TOLERANCES["int8"].min_sqnr
    (found,) = judged(good, worse, gate)
    assert found.score.value > gate.limit
    assert found.score.loss is None
    strict = dataclasses.replace(gate, tolerance=dataclasses.replace(gate.tolerance, min_sqnr=found.score.value + 1))
    with pytest.raises(AccuracyError, match=r"has SQNR .* dB .* at least .* is asked for \(`min_sqnr`\)"):
        judged(good, worse, strict)
    with pytest.raises(UsageError, match="nothing of it is lost: the limit is `min_sqnr`"):
        Gate(folder=scenes, metric=MetricOptions(metric="sqnr"), max_drop=1)


def test_the_verdict_depends_on_the_metric_and_on_the_file_of_the_users(make_segmenter, scenes, tmp_path):
    artifact = make_segmenter(tmp_path / "net")
    gate = Gate(folder=scenes, metric=MetricOptions(metric="miou"))
    first = gate.request(artifact)
    assert first == gate.request(artifact)
    assert first != dataclasses.replace(gate, certify=True).request(artifact)
    assert first != Gate(folder=scenes, metric=MetricOptions(metric="miou", ignore_index=0)).request(artifact)
    (scenes / "masks/0.png").touch()
    assert first != gate.request(artifact)
