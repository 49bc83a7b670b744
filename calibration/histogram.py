"""A histogram of magnitudes, made in one pass over a stream. It depends neither on the order nor on the batch size."""

import math
from collections.abc import Iterator

import numpy as np

BINS = 4096
"""The number of bins, which all have the same width."""

CHUNK = 131072
"""The number of elements counted at a time: temporaries fit the cache, and memory does not grow with the array."""

_LANES = 2
"""Neighbouring values are counted in separate arrays, because a processor stalls when it increments the same bin twice in a
row, which the many zeros after a ReLU would cause."""

LOWEST_EXPONENT = -115
"""The range is at least 2^-115 (2.4e-35), so that the inverse of the bin width is a finite float32."""


_LANE = (np.arange(CHUNK) % _LANES * BINS).astype(np.int32)


class HistogramError(ValueError):
    """Values that cannot be counted."""


class NonFiniteError(HistogramError):
    """Values that contain NaN (`nans` of them) or infinities."""

    def __init__(self, nans: int, infinities: int, total: int) -> None:
        super().__init__(f"{nans} NaN and {infinities} infinite among {total} values; expected finite ones")
        self.nans = nans
        self.infinities = infinities


class Histogram:
    """How often magnitudes |x| occurred, in BINS equal bins from 0 to a power of two.

    Bin b holds b * width <= |x| < (b + 1) * width. The bins reach to the smallest power of two above `amax`, and at
    least to 2^LOWEST_EXPONENT; for a larger value the range doubles and neighbouring bins merge. Widths are powers of two, so
    that scaling is exact, and the counts do not depend on the order of the values or on their division into arrays.

    counts: (BINS,) int64; values that are exactly zero are in bin 0.
    width: the width of a bin; 0.0 until the first value other than zero.
    amax: the exact largest magnitude; 0.0 if there are no values. low: the exact smallest value, with its sign.
    zeros: the number of values that are exactly zero, which every scale represents without error.
    """

    __slots__ = ("amax", "counts", "low", "width", "zeros")

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.width = 0.0
        self.amax = 0.0
        self.low = math.inf
        self.zeros = 0

    @property
    def total(self) -> int:
        """The number of values."""
        return int(self.counts.sum())

    def add(self, values: np.ndarray) -> None:
        """Count `values`: float32 or float16, of any shape and layout.

        Raises NonFiniteError for NaN or infinity and HistogramError for another dtype, and counts nothing then.
        """
        if values.dtype not in (np.float32, np.float16):
            raise HistogramError(f"values of dtype {values.dtype} cannot be counted; expected float32 or float16")
        if not values.size or self._count(values):
            return
        amax = _largest(values)
        if amax == 0:  # and so were all values before
            self.counts[0] += values.size
            self.zeros += values.size
            self.low = min(self.low, 0.0)
            return
        width = max(self.width, math.ldexp(1 / BINS, max(math.frexp(amax)[1], LOWEST_EXPONENT)))
        self.counts = _widened(self.counts, self.width, width)
        self.width = width
        counted = self._count(values)
        assert counted, "the range was made for these values"

    def _count(self, values: np.ndarray) -> bool:
        """Count `values` if all are finite and in the range. Otherwise count nothing and return False."""
        if not self.width:
            return False
        scale = np.float32(1 / self.width)
        size = min(CHUNK, values.size)
        scaled, bins, lanes = (np.empty(size, dtype=dtype) for dtype in (np.float32, np.int32, np.int64))
        counts = np.zeros(_LANES * BINS, dtype=np.int64)
        top, low, zeros = 0.0, self.low, 0
        for chunk in _chunks(values):
            magnitudes, indices = scaled[: chunk.size], bins[: chunk.size]
            with np.errstate(over="ignore", invalid="ignore"):
                np.abs(np.multiply(chunk, scale, out=magnitudes), out=magnitudes)
            largest = float(magnitudes.max())
            if not largest < BINS:  # a NaN is the maximum of its chunk
                return False
            np.copyto(indices, magnitudes, casting="unsafe")
            counts += np.bincount(np.add(indices, _LANE[: chunk.size], out=lanes[: chunk.size]), minlength=_LANES * BINS)
            zeros += chunk.size - int(np.count_nonzero(chunk != 0))
            top = max(top, largest)
            low = min(low, float(chunk.min()))
        self.counts += counts.reshape(_LANES, BINS).sum(axis=0)
        self.amax = max(self.amax, top * self.width)
        self.low = low
        self.zeros += zeros
        return True


def _largest(values: np.ndarray) -> float:
    """The largest magnitude. Raises NonFiniteError."""
    amax = float(np.array([np.abs(chunk).max() for chunk in _chunks(values)]).max())  # a NaN is the maximum of its chunk
    if not math.isfinite(amax):
        nans = sum(int(np.isnan(chunk).sum()) for chunk in _chunks(values))
        infinities = sum(int(np.isinf(chunk).sum()) for chunk in _chunks(values))
        raise NonFiniteError(nans, infinities, values.size)
    return amax


def _widened(counts: np.ndarray, width: float, wider: float) -> np.ndarray:
    """The counts for bins of `wider` instead of `width`, which is smaller by a power of two or the same."""
    if not width or wider == width:  # with a width of zero all values are zero, and stay in bin 0
        return counts
    together = min(int(wider / width), BINS)  # if they are BINS times as wide or more, the first bin has all values
    merged = np.zeros_like(counts)
    merged[: BINS // together] = counts.reshape(-1, together).sum(axis=1)
    return merged


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    """The elements of `values` as float32, in one-dimensional pieces of at most CHUNK, in memory order."""
    with np.nditer(
        values, flags=["external_loop", "buffered"], op_dtypes=[np.float32], casting="safe", order="K", buffersize=CHUNK
    ) as chunks:
        yield from chunks
