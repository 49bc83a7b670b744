import numpy as np
import pytest

from deploy.errors import UsageError
from deploy.evaluation.gate import Gate, paired_drop


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
