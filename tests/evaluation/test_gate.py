import pytest

from deploy.artifact.preprocess import Preprocess
from deploy.errors import AccuracyError, UsageError
from deploy.evaluation.gate import Expected, Gate, check_expected
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
