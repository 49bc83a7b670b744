"""`deploy.verify.error`: what counts as beyond the floor."""

import math

import numpy as np
import pytest

from deploy.verify.error import judged

RNG = np.random.default_rng(0)
EXACT = RNG.standard_normal((4, 8, 16, 16)).astype(np.float32)


def noise(size: float) -> np.ndarray:
    return (EXACT + size * np.random.default_rng(int(size * 1e6)).standard_normal(EXACT.shape)).astype(np.float32)


ROUNDED = [noise(0.010), noise(0.0101)]


@pytest.mark.parametrize(("size", "beyond"), [(0.005, False), (0.0099, False), (0.0122, False), (0.025, True), (0.1, True)])
def test_an_error_is_held_against_the_floor(size: float, beyond: bool) -> None:
    error = judged(noise(size), ROUNDED, EXACT)
    assert error.beyond is beyond
    assert error.error == pytest.approx(size, rel=0.05)
    assert error.floor == pytest.approx(0.01, rel=0.05)


def test_one_channel_that_is_far_off_is_beyond_the_floor_though_the_whole_is_not() -> None:
    actual = noise(0.009)
    actual[:, 3] += 0.08 * np.random.default_rng(1).standard_normal(actual[:, 3].shape).astype(np.float32) * 0.6
    error = judged(actual, ROUNDED, EXACT)
    assert error.error < 2 * error.floor
    assert not judged(noise(0.009), ROUNDED, EXACT).beyond
    far = actual.copy()
    far[:, 3] += 0.2
    assert judged(far, ROUNDED, EXACT).beyond


def test_few_numbers_are_given_more_room() -> None:
    exact = np.ones((2, 1), dtype=np.float32)
    rounded = [exact + 0.01, exact - 0.01]
    assert not judged(exact + 0.03, rounded, exact).beyond
    assert judged(exact + 1, rounded, exact).beyond


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_beyond_every_floor_unless_both_have_it(value: float) -> None:
    actual = EXACT.copy()
    actual[0, 0, 0, 0] = value
    assert judged(actual, ROUNDED, EXACT).times == math.inf
    assert judged(actual, [actual + 0, actual + 0], actual).times == 0


def test_shapes_that_differ_are_beyond_every_floor() -> None:
    assert judged(EXACT[:1], ROUNDED, EXACT).times == math.inf


def test_integers_agree_or_do_not() -> None:
    exact = np.arange(100)
    other = exact.copy()
    other[:10] += 1
    assert not judged(exact, [exact, exact], exact).beyond
    error = judged(other, [exact, exact], exact)
    assert (error.error, error.beyond) == (0.1, True)
    assert not judged(other, [other, other], exact).beyond
