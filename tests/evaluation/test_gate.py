import math

import numpy as np
import pytest

from deploy.artifact.preprocess import Preprocess
from deploy.errors import AccuracyError, UsageError
from deploy.evaluation.gate import Expected, Gate, check_expected, paired_drop, wilson
from deploy.progress import silent


def right(*flags: int) -> np.ndarray:
    return np.array(flags, dtype=bool)


def test_the_drop_is_the_difference_of_the_accuracies_in_points():
    drop, low, high = paired_drop(right(1, 1, 1, 0), right(1, 0, 1, 0))
    assert drop == 25
    assert low < 25 < high
    assert paired_drop(right(0, 0), right(0, 1))[0] == -50


def test_the_interval_is_that_of_bonett_and_price():
    """Their formula by hand: 10 pairs, 3 lost, 1 won: p = 4/12, q = 2/12, margin = 1.96 sqrt((6/12 - (2/12)^2) / 12)."""
    before = right(1, 1, 1, 1, 1, 1, 0, 0, 0, 0)
    after = right(0, 0, 0, 1, 1, 1, 1, 0, 0, 0)
    drop, low, high = paired_drop(before, after)
    margin = 1.959964 * ((6 / 12 - (2 / 12) ** 2) / 12) ** 0.5
    assert (drop, low, high) == pytest.approx((20, 100 * (2 / 12 - margin), 100 * (2 / 12 + margin)), rel=1e-5)


def test_without_any_disagreement_the_interval_still_has_a_width_that_shrinks_with_the_images():
    few = paired_drop(np.ones(10, bool), np.ones(10, bool))
    many = paired_drop(np.ones(1000, bool), np.ones(1000, bool))
    assert few[0] == many[0] == 0
    assert few[2] - few[1] > many[2] - many[1] > 0


def test_the_interval_covers_the_true_drop_in_19_of_20_samples():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        draws = rng.random(200)
        before = draws < 0.9
        after = (draws < 0.86) | (draws > 0.98)  # 4 points lost, 2 won
        _, low, high = paired_drop(before, after)
        covered += low <= 2 <= high
    assert covered >= 465


def test_a_limit_outside_0_to_100_points_is_refused(tmp_path):
    with pytest.raises(UsageError, match="`max_drop` must be 0 to 100 points"):
        Gate(folder=tmp_path, max_drop=-1)


def test_the_interval_of_an_accuracy_is_wilsons():
    """His formula by hand, of 8 right in 10, and published values for 81 of 263 (Newcombe 1998, table I: 0.2553 to 0.3662)."""
    z2 = 1.959964**2
    centre, margin = 0.8 + z2 / 20, (z2 * (0.8 * 0.2 / 10 + z2 / 400)) ** 0.5
    assert wilson(8, 10) == pytest.approx((100 * (centre - margin) / (1 + z2 / 10), 100 * (centre + margin) / (1 + z2 / 10)))
    assert wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.005)
    assert wilson(0, 20) == pytest.approx((0, 16.11), abs=0.005)
    assert wilson(20, 20)[1] == 100


def test_the_interval_covers_the_true_accuracy_in_19_of_20_samples():
    """By the binomial distribution of 200 images; on average over accuracies, for the share goes up and down between them."""
    ends = [wilson(right, 200) for right in range(201)]
    covered = [
        sum(math.comb(200, k) * p**k * (1 - p) ** (200 - k) for k, (low, high) in enumerate(ends) if low <= 100 * p <= high)
        for p in np.linspace(0.5, 0.95, 46)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.004)
    assert min(covered) > 0.93


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
