import math

import numpy as np
import pytest

from deploy.evaluation.intervals import GROUPS, bootstrap, images_for_loss, jackknife, paired_drop, percentiles, wilson


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


def test_a_bootstrap_of_a_mean_has_the_width_that_theory_says_and_is_the_same_every_time():
    values = np.random.default_rng(1).normal(50, 10, 400)
    scores = bootstrap(400, lambda weights: weights @ values / weights.sum(axis=1))
    low, high = percentiles(scores)
    margin = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - margin, values.mean() + margin), abs=0.1)
    np.testing.assert_array_equal(scores, bootstrap(400, lambda weights: weights @ values / weights.sum(axis=1)))


def test_a_jackknife_covers_the_true_mean_in_19_of_20_samples():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        values = rng.normal(5, 2, 60)
        parts = np.array([np.delete(values, np.arange(group, 60, GROUPS)).mean() for group in range(GROUPS)])
        low, high = jackknife(values.mean(), parts)
        covered += low <= 5 <= high
    assert 370 <= covered <= 395
    assert jackknife(0.0, np.array([1.0] * 9 + [np.nan])) is None


def test_the_images_that_would_decide_go_with_the_square_of_the_width():
    assert images_for_loss(0.5, 1.5, 1.0, 100) == 300  # the width must be halved
    assert images_for_loss(1.0, 1.5, 1.0, 100) is None
