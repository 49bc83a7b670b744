import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from deploy.calibration.histogram import Histogram
from deploy.calibration.thresholds import (
    METHODS,
    PARTS,
    ZEROS,
    Method,
    ThresholdError,
    divergences,
    squared_errors,
    threshold,
)

COUNT = 40_000


def _rng() -> np.random.Generator:
    return np.random.default_rng(11)


def _gaussian() -> np.ndarray:
    return _rng().normal(size=COUNT)


def _laplace_with_outliers() -> np.ndarray:
    values = _rng().laplace(size=COUNT)
    values[:40] = _rng().uniform(20, 60, size=40)
    return values


def _softmax() -> np.ndarray:
    powers = np.exp(2 * _rng().normal(size=(COUNT // 50, 50)))
    return (powers / powers.sum(axis=1, keepdims=True)).ravel()


DISTRIBUTIONS: dict[str, Callable[[], np.ndarray]] = {
    "uniform": lambda: _rng().uniform(-1, 1, size=COUNT),
    "gaussian": _gaussian,
    "student t3": lambda: _rng().standard_t(3, size=COUNT),
    "student t5": lambda: _rng().standard_t(5, size=COUNT),
    "laplace": lambda: _rng().laplace(size=COUNT),
    "laplace with outliers": _laplace_with_outliers,
    "exponential": lambda: _rng().exponential(size=COUNT),
    "lognormal": lambda: np.exp(_gaussian()),
    "relu": lambda: np.maximum(_gaussian(), 0),
    "sparse relu": lambda: np.maximum(_gaussian() - 1.5, 0),
    "relu6": lambda: np.clip(3 * _gaussian() + 1, 0, 6),
    "relu of student t3": lambda: np.maximum(_rng().standard_t(3, size=COUNT), 0),
    "silu": lambda: 2 * _gaussian() / (1 + np.exp(-2 * _gaussian())),
    "sigmoid": lambda: 1 / (1 + np.exp(-4 * _gaussian())),
    "softmax": _softmax,
    "channels of many scales": lambda: _gaussian() * np.repeat(np.exp(_rng().normal(size=100)), COUNT // 100),
    "few values": lambda: _gaussian()[:300],
    "constant": lambda: np.full(COUNT, 0.3),
    "negative constant": lambda: np.full(COUNT, -0.3),
    "two values": lambda: np.where(_gaussian() > 1, 1.7, -0.4),
}
every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)


def draw(name: str) -> np.ndarray:
    return DISTRIBUTIONS[name]().astype(np.float32)


def of(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


def quantized_error(values: np.ndarray, clip: float) -> float:
    """Mean squared error of the values themselves."""
    values = values.astype(np.float64)
    scale = clip / 127
    return float(np.mean((values - np.clip(np.rint(values / scale), -127, 127) * scale) ** 2))


def sqnr(values: np.ndarray, clip: float) -> float:
    """Signal-to-quantization-noise ratio, dB."""
    return 10 * math.log10(float(np.mean(values.astype(np.float64) ** 2)) / max(quantized_error(values, clip), 1e-30))


def bins(histogram: Histogram) -> tuple[np.ndarray, float, float]:
    """Counts of the 1449 to 2896 bins up to that of amax, without the exact zeros; amax in bins; the width of a bin."""
    counts = histogram.counts[: np.flatnonzero(histogram.counts)[-1] + 1].astype(np.float64)
    counts[0] -= histogram.zeros
    if len(counts) <= 2896:
        return counts, histogram.amax / histogram.width, histogram.width
    padded = [*counts.tolist(), 0.0]
    merged = np.array([padded[index] + padded[index + 1] for index in range(0, len(counts), 2)])
    return merged, histogram.amax / histogram.width / 2, histogram.width * 2


# References: slow, and plain from the formulas.


def reference_percentile(values: np.ndarray, percentile: float) -> float:
    """The smallest magnitude that so many per cent of all do not exceed, at most ZEROS zeros counted for each other number."""
    others = [abs(float(value)) for value in values if value]
    magnitudes = sorted(others + [0.0] * min(len(values) - len(others), ZEROS * len(others)))
    least = percentile / 100 * len(magnitudes) - 1e-9
    return next(magnitude for rank, magnitude in enumerate(magnitudes, start=1) if rank >= least)


def reference_squared_error(counts: np.ndarray, amax: float, clip: float) -> float:
    """The integral of p(x) (x - q(x))^2, bin by bin and level by level; the last bin is a point at amax."""
    step = clip / 127
    total = 0.0
    for index, count in enumerate(counts[:-1]):
        start = float(index)
        while start < index + 1 and count:
            level = min(127, math.floor(start / step + 0.5))
            end = min(index + 1.0, (level + 0.5) * step) if level < 127 else index + 1.0
            if end <= start:  # start is the border of the next level, but for its last digit
                level += 1
                end = min(index + 1.0, (level + 0.5) * step)
            total += count * ((end - level * step) ** 3 - (start - level * step) ** 3) / 3
            start = end
    level = min(127, round(amax / step))
    return (total + counts[-1] * (amax - level * step) ** 2) / counts.sum()


def reference_divergence(counts: list[float], clip: int) -> float:
    """Migacz's pseudocode for one threshold, in 128 parts."""
    p = counts[:clip]
    p[-1] += sum(counts[clip:])
    q = [0.0] * clip
    for part in range(128):
        inside = range(part * clip // 128, (part + 1) * clip // 128)
        filled = [index for index in inside if p[index] > 0]
        mass = sum(counts[index] for index in inside)
        for index in filled:
            q[index] = mass / len(filled)
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return math.inf
    of_p, of_q = sum(p), sum(q)
    return sum(a / of_p * math.log((a / of_p) / (b / of_q)) for a, b in zip(p, q, strict=True) if a > 0)


# The tests.


@every_distribution
@pytest.mark.parametrize("method", METHODS)
def test_a_threshold_is_above_zero_and_not_above_amax(name, method):
    histogram = of(draw(name))
    assert 0 < threshold(histogram, method) <= histogram.amax


@every_distribution
def test_max_is_exact(name):
    values = draw(name)
    assert threshold(of(values), "max") == float(np.abs(values).max())


@every_distribution
@pytest.mark.parametrize("percentile", [99.99, 99, 50, 100, 0.01])
def test_percentile_agrees_with_the_sorted_values_to_one_bin(name, percentile):
    values = draw(name)
    histogram = of(values)
    found = threshold(histogram, "percentile", percentile=percentile)
    assert found == pytest.approx(reference_percentile(values, percentile), rel=0, abs=histogram.width * (1 + 1e-9))
    if percentile == 100:
        assert found == histogram.amax


@every_distribution
def test_squared_errors_agree_with_the_integral(name):
    counts, amax, _ = bins(of(draw(name)))
    clips = np.array([amax, 0.77 * amax, amax / 3, amax / 17, 40.0, 3.0, 0.5])
    expected = [reference_squared_error(counts, amax, float(clip)) for clip in clips]
    noise = 1e-12 * amax**2  # of differences of numbers as large as amax squared
    np.testing.assert_allclose(squared_errors(counts, amax, clips), expected, rtol=1e-6, atol=noise)


def test_squared_errors_are_never_negative():
    for amax in np.linspace(1500, 2800, 300):
        counts = np.zeros(int(amax) + 1)
        counts[-1] = 1000
        assert squared_errors(counts, amax, np.array([amax, amax / 2]))[0] >= 0


@pytest.mark.parametrize("name", ["uniform", "gaussian", "student t3", "laplace with outliers", "relu", "relu6", "sigmoid"])
def test_squared_errors_agree_with_the_quantized_values(name):
    values = draw(name)
    histogram = of(values)
    counts, amax, width = bins(histogram)
    share = 1 - histogram.zeros / histogram.total
    for clip in (amax, 0.8 * amax, 0.3 * amax):
        (found,) = squared_errors(counts, amax, np.array([clip])) * width**2 * share
        assert found == pytest.approx(quantized_error(values, clip * width), rel=0.02)


@every_distribution
def test_mse_finds_the_least_error(name):
    values = draw(name)
    histogram = of(values)
    best = min(quantized_error(values, histogram.amax * percent / 200) for percent in range(1, 201))
    found = quantized_error(values, threshold(histogram, "mse"))
    near = 1.5 if name == "two values" else 1.02  # which leave dips in the error that averaging does not see
    assert found <= near * best + 1e-14  # constants: the rounding of the threshold itself


@every_distribution
def test_divergences_agree_with_the_pseudocode(name):
    counts = bins(of(draw(name)))[0].tolist()
    clips = sorted({PARTS, PARTS + 1, 200, 257, len(counts) // 3, len(counts) // 2, len(counts) - 1, len(counts)} - {0})
    clips = [clip for clip in clips if PARTS <= clip <= len(counts)]
    expected = [reference_divergence(counts, clip) for clip in clips]
    np.testing.assert_allclose(divergences(np.array(counts), np.array(clips)), expected, rtol=1e-9, atol=1e-12)


def averaged(values: list[float]) -> list[float]:
    """Over eight neighbours on either side, which weigh 8/9, 7/9 and so on; straight lines run across what is infinite."""
    known = [place for place, value in enumerate(values) if math.isfinite(value)]
    filled = list(values)
    for left, right in pairwise(known):
        for place in range(left + 1, right):
            filled[place] = values[left] + (values[right] - values[left]) * (place - left) / (right - left)

    def at(place: int) -> float:
        if place < 0:
            return 2 * filled[0] - filled[-place]
        return filled[place] if place < len(filled) else 2 * filled[-1] - filled[2 * (len(filled) - 1) - place]

    return [sum((9 - abs(away)) * at(place + away) for away in range(-8, 9)) / 81 for place in range(len(values))]


def lowest(clips: list[float], values: list[float]) -> float:
    """The clip of the least value, moved to the bottom of the parabola through it and its neighbours if these are finite."""
    best = values.index(min(values))
    around = values[max(0, best - 1) : best + 2]
    if len(around) < 3 or best == 0 or not all(math.isfinite(value) for value in around):
        return clips[best]
    a, b, _ = np.polyfit([-1, 0, 1], np.array(around) / abs(min(around)), 2)
    return clips[best] - b / (2 * a)


@pytest.mark.parametrize("name", ["gaussian", "relu", "student t3", "student t5", "laplace", "relu6", "uniform"])
def test_mse_takes_the_least_error_averaged_over_neighbours(name):
    histogram = of(draw(name))
    counts, amax, width = bins(histogram)
    clips = [*range(1, len(counts) - 1), amax]
    errors = squared_errors(counts, amax, np.array(clips)).tolist()  # these agree with the integral: see above
    assert threshold(histogram, "mse") == pytest.approx(lowest(clips, averaged(errors)) * width, rel=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "relu", "student t5", "channels of many scales", "relu6", "lognormal"])
def test_entropy_takes_the_least_divergence_averaged_over_neighbours(name):
    histogram = of(draw(name))
    counts, amax, width = bins(histogram)
    clips = [*range(PARTS, len(counts) - 1), amax]
    places = np.array([*range(PARTS, len(counts) - 1), len(counts)])
    found = divergences(counts, places).tolist()  # these agree with the pseudocode: see above
    assert math.isfinite(found[0])
    assert math.isfinite(found[-1])
    errors = squared_errors(counts, amax, np.array([*range(1, PARTS), *clips]))
    allowed = errors[PARTS - 1 :] <= 2 * errors.min()
    chosen = [
        average if allow and math.isfinite(value) else math.inf
        for average, value, allow in zip(averaged(found), found, allowed, strict=True)
    ]
    assert threshold(histogram, "entropy") == pytest.approx(lowest(clips, chosen) * width, rel=1e-6)


def test_entropy_is_as_mse_where_no_candidate_has_a_divergence():
    values = np.append(_rng().uniform(0, 0.03, size=400_000), 1.0).astype(np.float32)
    histogram = of(values)
    assert threshold(histogram, "entropy") == threshold(histogram, "mse") > 0.1


@every_distribution
def test_entropy_is_never_far_below_mse(name):
    values = draw(name)
    histogram = of(values)
    assert sqnr(values, threshold(histogram, "entropy")) > sqnr(values, threshold(histogram, "mse")) - 3.1


def test_the_divergence_alone_would_lose_much_more():
    values = draw("softmax")
    histogram = of(values)
    counts, _, width = bins(histogram)
    clips = np.arange(PARTS, len(counts) + 1)
    alone = clips[np.argmin(divergences(counts, clips))] * width
    assert sqnr(values, alone) < sqnr(values, threshold(histogram, "mse")) - 10


def test_mse_clips_a_gaussian_where_the_literature_does():
    values = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    assert threshold(of(values), "mse") == pytest.approx(3.95, abs=0.1)
    assert sqnr(values, threshold(of(values), "mse")) == pytest.approx(40.5, abs=0.2)


@pytest.mark.parametrize("method", ["mse", "entropy", "percentile"])
@pytest.mark.parametrize("name", ["uniform", "relu6", "sigmoid"])
def test_what_has_no_tail_keeps_its_range(name, method):
    histogram = of(draw(name))
    assert threshold(histogram, method) >= 0.98 * histogram.amax


@pytest.mark.parametrize("method", ["max", "mse", "entropy"])
@pytest.mark.parametrize("name", ["gaussian", "student t3", "relu", "few values", "constant"])
def test_zeros_have_no_say(name, method):
    values = draw(name)
    values = values[values != 0]
    alone = threshold(of(values), method)
    for zeros in (1, len(values), 20 * len(values)):
        assert threshold(of(np.append(values, np.zeros(zeros, dtype=np.float32))), method) == alone


def test_entropy_clips_little_after_a_relu_where_counted_zeros_would_make_it_clip_hard():
    values = draw("relu")
    histogram = of(values)
    assert sqnr(values, threshold(histogram, "entropy")) > sqnr(values, threshold(histogram, "mse")) - 1.5
    counts, _, width = bins(histogram)
    counts[0] += histogram.zeros
    clips = np.arange(PARTS, len(counts) + 1)
    with_zeros = clips[np.argmin(divergences(counts, clips))] * width
    assert sqnr(values, with_zeros) < sqnr(values, threshold(histogram, "mse")) - 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.3, -0.3, 1.0, 6.0, -1e-30, 1e30, 1e-45, -3.4028235e38])
def test_a_constant_is_its_own_threshold(value, method):
    for shape in ((1,), (1000,)):
        values = np.full(shape, value, dtype=np.float32)
        assert threshold(of(values), method) == float(abs(values[0]))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_and_zeros_have_the_threshold_zero(method):
    assert threshold(Histogram(), method) == 0.0
    for zero in (0.0, -0.0):
        assert str(threshold(of(np.full(100, zero, dtype=np.float32)), method)) == "0.0"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-100, -20, 5, 100])
def test_thresholds_scale_with_the_values(method, exponent):
    values = draw("gaussian")
    scaled = np.ldexp(values, exponent)
    assert threshold(of(scaled), method) == pytest.approx(math.ldexp(threshold(of(values), method), exponent), rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-37])
def test_tiny_and_huge_magnitudes_have_sensible_thresholds(method, scale):
    values = draw("gaussian")
    clip = threshold(of((values * scale).astype(np.float32)), method)
    assert clip == pytest.approx(threshold(of(values), method) * scale, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_subnormal_values_have_a_threshold(method):
    for scale in (1e-37, 1e-38, 1e-40, 1e-44):
        histogram = of((draw("gaussian") * scale).astype(np.float32))
        assert histogram.amax / 4 < threshold(histogram, method) <= histogram.amax
        if method == "entropy":  # fewer bins than parts: there is nothing to choose from
            assert threshold(histogram, method) == histogram.amax


@every_distribution
@pytest.mark.parametrize("method", METHODS)
def test_rounding_as_between_batch_sizes_moves_a_threshold_by_one_bin_at_most(name, method):
    values = draw(name)
    if name == "sigmoid":
        values = np.minimum(values, np.float32(1 - 1e-6))  # not over 1, where the bins become twice as wide: the next test
    found = []
    for seed in range(4):
        noise = np.random.default_rng(seed).normal(size=values.shape) * 3e-7
        found.append(threshold(of((values * (1 + noise)).astype(np.float32)), method))
    assert max(found) - min(found) <= bins(of(values))[2] * (1 + 1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gaussian", "sigmoid", "relu6", "uniform"])
def test_a_range_that_just_doubles_moves_a_threshold_by_one_bin_at_most(name, method):
    values = draw(name).astype(np.float64)
    values /= np.abs(values).max()
    below, above = of((values * (1 - 1e-7)).astype(np.float32)), of((values * (1 + 1e-7)).astype(np.float32))
    assert above.width == 2 * below.width
    assert threshold(below, method) == pytest.approx(threshold(above, method), rel=0, abs=above.width * (1 + 1e-3))


def test_an_unknown_method_is_refused():
    wrong: Method = "kl"  # type: ignore[assignment]
    with pytest.raises(ThresholdError, match="unknown method 'kl'; expected one of max, percentile, mse, entropy"):
        threshold(Histogram(), wrong)


@pytest.mark.parametrize("percentile", [0, -1, 100.1, math.nan])
def test_a_percentile_out_of_range_is_refused(percentile):
    with pytest.raises(ThresholdError, match="percentile must be above 0 and at most 100, not"):
        threshold(Histogram(), "percentile", percentile=percentile)
