"""A histogram of magnitudes in one pass over a stream, whose counts depend neither on the order nor on the batching."""

import math
from collections.abc import Iterator

import numpy as np

BINS = 4096
"""Bins of equal width in a histogram."""

CHUNK = 131072
"""Elements looked at together: their temporaries stay in the cache, and memory does not grow with the array."""

_LANES = 2
"""Neighbours are counted apart, for a processor waits when it counts the same bin twice in a row: a ReLU makes many zeros."""

LOWEST_EXPONENT = -115
"""The range is never below 2^-115 (2.4e-35), so that one over the bin width is a finite float32."""


_LANE = (np.arange(CHUNK) % _LANES * BINS).astype(np.int32)


class HistogramError(ValueError):
    """Values that cannot be counted."""


class NonFiniteError(HistogramError):
    """Values of which `nans` are not a number and `infinities` are infinite."""

    def __init__(self, nans: int, infinities: int, total: int) -> None:
        super().__init__(f"{nans} NaN and {infinities} infinite among {total} values; expected finite ones")
        self.nans = nans
        self.infinities = infinities


class Histogram:
    """How often each magnitude |x| occurred, in BINS equal bins over 0 to a power of two.

    Bin b holds b * width <= |x| < (b + 1) * width. The bins span the smallest power of two above `amax` (and at least
    2^LOWEST_EXPONENT); when a larger value comes, the range doubles and neighbouring bins merge. Widths are powers of two,
    so that scaling is exact, and the counts are those of the values, whatever the order and the arrays they came in.

    counts: (BINS,) int64; values that are exactly zero lie in bin 0.
    width: the width of a bin; 0.0 while no value but zero has come.
    amax: the largest magnitude, exact; 0.0 while empty.
    zeros: how many values were exactly zero, which every scale represents without an error.
    """

    __slots__ = ("amax", "counts", "width", "zeros")

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.width = 0.0
        self.amax = 0.0
        self.zeros = 0

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def add(self, values: np.ndarray) -> None:
        """Count `values`: float32 or float16, of any shape and layout.

        Raises NonFiniteError for NaN or infinity among them and HistogramError for another dtype; nothing is counted then.
        """
        if values.dtype not in (np.float32, np.float16):
            raise HistogramError(f"values of dtype {values.dtype} cannot be counted; expected float32 or float16")
        if not values.size or self._count(values):
            return
        amax = _largest(values)
        if amax == 0:  # and nothing else has come yet
            self.counts[0] += values.size
            self.zeros += values.size
            return
        width = max(self.width, math.ldexp(1 / BINS, max(math.frexp(amax)[1], LOWEST_EXPONENT)))
        self.counts = _widened(self.counts, self.width, width)
        self.width = width
        counted = self._count(values)
        assert counted, "the range was made for these values"

    def _count(self, values: np.ndarray) -> bool:
        """Count `values` if all lie in the range; False, and nothing is counted, when one does not, or is not finite."""
        if not self.width:
            return False
        scale = np.float32(1 / self.width)
        size = min(CHUNK, values.size)
        scaled, bins, lanes = (np.empty(size, dtype=dtype) for dtype in (np.float32, np.int32, np.int64))
        counts = np.zeros(_LANES * BINS, dtype=np.int64)
        top, zeros = 0.0, 0
        for chunk in _chunks(values):
            here, found = scaled[: chunk.size], bins[: chunk.size]
            with np.errstate(over="ignore", invalid="ignore"):
                np.abs(np.multiply(chunk, scale, out=here), out=here)
            largest = float(here.max())
            if not largest < BINS:  # NaN is the largest of the chunk that it is in
                return False
            np.copyto(found, here, casting="unsafe")
            counts += np.bincount(np.add(found, _LANE[: chunk.size], out=lanes[: chunk.size]), minlength=_LANES * BINS)
            zeros += chunk.size - int(np.count_nonzero(chunk != 0))
            top = max(top, largest)
        self.counts += counts.reshape(_LANES, BINS).sum(axis=0)
        self.amax = max(self.amax, top * self.width)
        self.zeros += zeros
        return True


def _largest(values: np.ndarray) -> float:
    """The largest magnitude. Raises NonFiniteError."""
    amax = float(np.array([np.abs(chunk).max() for chunk in _chunks(values)]).max())  # NaN is the largest of its chunk
    if not math.isfinite(amax):
        nans = sum(int(np.isnan(chunk).sum()) for chunk in _chunks(values))
        infinities = sum(int(np.isinf(chunk).sum()) for chunk in _chunks(values))
        raise NonFiniteError(nans, infinities, values.size)
    return amax


def _widened(counts: np.ndarray, width: float, wider: float) -> np.ndarray:
    """The counts of bins of `width` in bins of `wider`: the same, or so many times as wide as a power of two says."""
    if not width or wider == width:  # while the width is zero, so are all values, and they stay in bin 0
        return counts
    together = min(int(wider / width), BINS)  # when they are BINS times as wide or more, the first holds all
    merged = np.zeros_like(counts)
    merged[: BINS // together] = counts.reshape(-1, together).sum(axis=1)
    return merged


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    """The elements of `values` as float32, in pieces of one dimension and at most CHUNK of them, in the order of memory."""
    with np.nditer(
        values, flags=["external_loop", "buffered"], op_dtypes=[np.float32], casting="safe", order="K", buffersize=CHUNK
    ) as chunks:
        yield from chunks
