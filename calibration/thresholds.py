"""Chooses, from a histogram of magnitudes, where 8-bit quantization clips. The scale is this threshold over 127."""

from typing import Literal, get_args

import numpy as np

from .histogram import Histogram

Method = Literal["max", "percentile", "mse", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

LEVELS = 127
"""Positive levels of symmetric INT8: a magnitude x becomes round(x / scale), at most 127."""

PARTS = 128
"""The number of equal parts into which `entropy` quantizes a distribution."""

MOST_BINS = 2896
"""`mse` and `entropy` use at most this many bins (2048 times the square root of two); more are merged in pairs.

A histogram doubles the width of its bins when amax passes a power of two. For a sigmoid or a softmax, this may depend on
the batch size. The merged bins are the same on both sides of the power of two.
"""

ZEROS = 9
"""How many zeros `percentile` counts for each other number at most: what it clips is at most ten times the share asked for."""

REACH = 8
"""Errors and divergences are averaged over this many candidates on both sides before the smallest is chosen.

Single values in the tail make both curves jagged, with nearly equal minima many bins apart. The last digits of the
activations, which differ with the batch size, would decide between them. The averaged curves have hardly any such minima.
They cost less than 0.1 dB of signal-to-noise ratio, except for activations with only a few values (1 dB for two values).
"""

ENTROPY_LOSS = 2.0
"""`entropy` chooses among the thresholds whose mean squared error is at most this multiple of the smallest (3 dB)."""


class ThresholdError(ValueError):
    """An unknown method, or a percentile out of range."""


def threshold(histogram: Histogram, method: Method, *, percentile: float = 99.99) -> float:
    """The magnitude to clip at, in the unit of the values: in (0, amax], or 0.0 if all values are zero.

    - `max`: the largest magnitude. Nothing is clipped.
    - `percentile`: `percentile` per cent of all magnitudes, zeros included, are not clipped (Wu et al. 2020,
      arXiv:2004.09602, on calibration); 100 is the same as `max`. Of data that is nearly all zeros, only ZEROS zeros for each
      other number are counted, which is our addition: else there would be nothing but zeros among those that are kept.
    - `mse`: the smallest mean squared error of the quantized values; see `squared_errors`.
    - `entropy`: the smallest Kullback-Leibler divergence of the quantized distribution (Migacz 2017); see `divergences`. KL
      measures how often a value occurs, but not how far clipping moves it. Alone it cuts off heavy tails, which costs 9 dB
      of signal-to-noise ratio on a Laplace distribution with 0.01 % of outliers and 20 dB on the entries of a softmax.
      Therefore, and this is our addition, only thresholds whose squared error is at most ENTROPY_LOSS times the smallest
      are candidates.

    `mse` and `entropy` try the edges of 1449 to MOST_BINS bins, and `amax`; `percentile` interpolates within a bin. All
    values in the last bin count as `amax`, so that constant and saturated activations keep their level.

    Raises ThresholdError for an unknown method and for a percentile outside (0, 100].
    """
    if method not in METHODS:
        raise ThresholdError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise ThresholdError(f"percentile must be above 0 and at most 100, not {percentile}")
    amax = histogram.amax
    if method == "max" or amax == 0:
        return amax
    width = histogram.width
    counts = histogram.counts[: int(amax / width) + 1].astype(np.float64)
    others = counts.sum() - histogram.zeros
    if method == "percentile":
        counts[0] -= max(0, histogram.zeros - ZEROS * others)
        return min(_percentile(counts, percentile) * width, amax)
    counts[0] -= histogram.zeros
    if len(counts) > MOST_BINS:
        counts = np.append(counts, np.zeros(len(counts) % 2)).reshape(-1, 2).sum(axis=1)
        width *= 2
    choose = _mse if method == "mse" else _entropy
    return choose(counts, amax / width) * width


def _percentile(counts: np.ndarray, percentile: float) -> float:
    rank = percentile / 100 * counts.sum()
    reached = np.cumsum(counts)
    index = int(np.searchsorted(reached, rank))
    if index >= len(counts) - 1:
        return float(len(counts))
    return float(index + 1 - (reached[index] - rank) / counts[index])


def squared_errors(counts: np.ndarray, amax: float, clips: np.ndarray) -> np.ndarray:
    """The mean squared error of rounding and clipping for every threshold in `clips`, in squared bin widths.

    counts: (n,) float64, not all zero, without the exact zeros, which have no error. amax: in the last bin; clips: (m,), in
    (0, amax]. The unit of both is the bin width.

    E(t) is the integral of p(x) (x - q(x))^2, where q rounds to the nearest of j t / 127, j = 0 to 127: rounding noise and
    clipping distortion together (Banner et al. 2019, arXiv:1810.05723). The density p is taken to be constant within a bin,
    and the integral is then exact: with T0(x) and T1(x) the share and the first moment of all values above x, d = t / 127
    and summation by parts

        E(t) = E[x^2] - 2 d sum_j T1((j + 1/2) d) + d^2 sum_j (2 j + 1) T0((j + 1/2) d),  j = 0 to 126.
    """
    share = counts / counts.sum()
    low = np.arange(len(counts), dtype=np.float64)
    high = low + 1
    low[-1] = high[-1] = amax
    density = share.copy()
    density[-1] = 0
    above = np.cumsum(share[::-1])[::-1]
    moment = np.cumsum((share * (low + high) / 2)[::-1])[::-1]
    square = float(share @ (low * low + low * high + high * high)) / 3

    step = clips[:, None] / LEVELS
    level = np.arange(LEVELS)
    border = (level + 0.5) * step
    index = border.astype(np.intp)
    inside = density[index] * (border - index)
    above_border = above[index] - inside
    moment_above = moment[index] - inside * (border + index) / 2
    d = step[:, 0]
    errors = square - 2 * d * moment_above.sum(axis=1) + d * d * (above_border @ (2 * level + 1))
    return np.asarray(np.maximum(errors, 0))  # rounding may make the difference of large numbers negative


def _mse(counts: np.ndarray, amax: float) -> float:
    clips = _candidates(counts, amax, 1)
    return _least(clips, _averaged(squared_errors(counts, amax, clips)))


def _candidates(counts: np.ndarray, amax: float, first: int) -> np.ndarray:
    """The edges of the bins from `first` on, with `amax` in place of the edges around it, which are equivalent to it."""
    return np.append(np.arange(first, len(counts) - 1, dtype=np.float64), amax)


def divergences(counts: np.ndarray, clips: np.ndarray) -> np.ndarray:
    """The Kullback-Leibler divergence KL(P || Q) for every threshold in `clips`; infinite if Q is zero where P is not.

    counts: (n,) float64, without the exact zeros. Every scale represents zeros, but their peak in bin 0, spread over the first
    part, would make wider thresholds look worse: if half of the values after a ReLU are zero, the threshold would be halved
    (NVIDIA's pytorch-quantization overwrites bin 0 with bin 1 for the same reason). clips: (m,) int, in bins, PARTS to n.

    For the threshold i, P is the first i bins, with everything above added to the last of them. Q is the first i bins in
    PARTS parts of equal width, and every part is spread evenly over those of its bins that are not empty in P. Both are
    normalised (Migacz, "8-bit Inference with TensorRT", GTC 2017, "Entropy Calibration - pseudocode"). All values are
    computed from cumulative sums.
    """
    empty = np.zeros(1)
    mass = np.concatenate((empty, np.cumsum(counts)))
    filled = np.concatenate((empty, np.cumsum(counts > 0)))
    terms = np.concatenate((empty, np.cumsum(_x_log_x(counts))))
    inside = mass[clips]
    outside = mass[-1] - inside
    last = counts[clips - 1]
    borders = clips[:, None] * np.arange(PARTS + 1) // PARTS
    part = np.diff(mass[borders], axis=1)
    bins = np.diff(filled[borders], axis=1)
    bins[:, -1] += (last == 0) & (outside > 0)  # filled in P by the values above
    reference = part.copy()
    reference[:, -1] += outside
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = np.where(reference > 0, reference * np.log(part / bins), 0).sum(axis=1)
        own = terms[clips - 1] + _x_log_x(last + outside)
        result = (own - cross) / mass[-1] + np.log(inside / mass[-1])
    return np.where(np.isnan(result), np.inf, result)


def _x_log_x(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1))


def _entropy(counts: np.ndarray, amax: float) -> float:
    if len(counts) <= PARTS:
        return amax
    clips = _candidates(counts, amax, 1)
    errors = squared_errors(counts, amax, clips)
    allowed = errors <= ENTROPY_LOSS * errors.min()
    clips, allowed = clips[PARTS - 1 :], allowed[PARTS - 1 :]
    divergence = divergences(counts, np.append(clips[:-1].astype(np.intp), len(counts)))
    allowed &= np.isfinite(divergence)
    if not allowed.any():  # the values that matter are in fewer bins than there are parts
        return _mse(counts, amax)
    return _least(clips, np.where(allowed, _averaged(divergence), np.inf))


def _averaged(values: np.ndarray) -> np.ndarray:
    """Averages of the finite values over REACH neighbours on both sides, with linearly decreasing weights."""
    positions = np.arange(len(values))
    finite = np.isfinite(values)
    filled = np.interp(positions, positions[finite], values[finite])
    padded = np.pad(filled, REACH, mode="reflect", reflect_type="odd")  # continues a slope and keeps the end values
    weights = np.bartlett(2 * REACH + 3)[1:-1]
    return np.convolve(padded, weights / weights.sum(), mode="valid")


def _least(clips: np.ndarray, values: np.ndarray) -> float:
    """The position of the minimum of `values`: that of the parabola through the smallest value and its two neighbours."""
    best = int(np.argmin(values))
    clip = float(clips[best])
    if 0 < best < len(clips) - 1 and np.isfinite(values[best - 1 : best + 2]).all():
        before, here, after = values[best - 1 : best + 2].tolist()
        bend = before - 2 * here + after
        clip += (before - after) / bend / 2 if bend else 0.0  # a plateau has no lowest point
    return clip
