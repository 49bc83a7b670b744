"""The damage of outputs, against what follows from the definitions."""

import numpy as np
import pytest

from deploy.tune.damage import WORST, damage


def test_the_divergence_of_classifiers_is_that_of_their_probabilities_averaged_over_all_rows() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.2, 0.2, 0.6]], np.float32))
    others = np.log(np.array([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1], [0.2, 0.2, 0.6]], np.float32)) + 3
    expected = (0.5 * np.log(2) - 0.25 * np.log(2)) / 3
    split = [{"y": logits[:1]}, {"y": logits[1:]}], [{"y": others[:1]}, {"y": others[1:]}]
    assert damage(*split, "kl") == pytest.approx(expected, rel=1e-6)
    assert damage([{"y": logits}], [{"y": logits}], "kl") == 0


def test_the_relative_error_is_averaged_over_the_outputs_that_are_no_integers() -> None:
    expected = [{"a": np.array([3.0, 4.0]), "b": np.array([1.0]), "n": np.array([1])}]
    found = [{"a": np.array([3.0, 3.0]), "b": np.array([1.5]), "n": np.array([9])}]
    assert damage(expected, found, "relative") == pytest.approx((1 / 25 + 0.25) / 2)


@pytest.mark.parametrize("kind", ["kl", "relative"])
def test_small_errors_add_up(kind: str) -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(500, 8))
    first, second = (rng.normal(size=exact.shape) * 0.03 for _ in range(2))

    def of(error: np.ndarray) -> float:
        return damage([{"y": exact}], [{"y": exact + error}], kind)  # type: ignore[arg-type]

    assert of(first + second) == pytest.approx(of(first) + of(second), rel=0.1)


@pytest.mark.parametrize("kind", ["kl", "relative"])
def test_what_is_no_number_is_the_worst(kind: str) -> None:
    assert damage([{"y": np.ones((1, 2))}], [{"y": np.full((1, 2), np.nan)}], kind) == WORST  # type: ignore[arg-type]
    assert damage([{"y": np.zeros((1, 2))}], [{"y": np.ones((1, 2))}], "relative") == WORST
