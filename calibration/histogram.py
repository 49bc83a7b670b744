"""A histogram of magnitudes in one pass over a stream, whose counts depend neither on the order nor on the batching."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

BINS = 4096
"""Bins of equal width in a histogram."""

CHUNK = 32768
"""Elements looked at together: their temporaries stay in the cache, and memory does not grow with the array."""

LOWEST_EXPONENT = -115
"""The range is never below 2^-115 (2.4e-35), so that one over the bin width is a finite float32."""


class HistogramError(ValueError):
    """Values that cannot be counted, or a state that is not that of a histogram."""


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
    low, high: the smallest and the largest value, signed and exact; 0.0 while empty.
    zeros: how many values were exactly zero, which every scale represents without an error.
    """

    __slots__ = ("counts", "high", "low", "width", "zeros")

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.width = 0.0
        self.low = 0.0
        self.high = 0.0
        self.zeros = 0

    @property
    def amax(self) -> float:
        """The largest magnitude, exact; 0.0 while empty."""
        return max(abs(self.low), abs(self.high))

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
        if not values.size:
            return
        extremes = np.array([(chunk.min(), chunk.max()) for chunk in _chunks(values)])  # NaN is the extreme of its chunk
        low, high = float(extremes[:, 0].min()), float(extremes[:, 1].max())
        if not (math.isfinite(low) and math.isfinite(high)):
            nans = sum(int(np.isnan(chunk).sum()) for chunk in _chunks(values))
            infinities = sum(int(np.isinf(chunk).sum()) for chunk in _chunks(values))
            raise NonFiniteError(nans, infinities, values.size)
        self._cover(low, high, _width(max(-low, high)))
        scale = np.float32(1 / self.width if self.width else 0.0)
        scaled = np.empty(min(CHUNK, values.size), dtype=np.float32)
        bins = np.empty(scaled.size, dtype=np.int32)
        for chunk in _chunks(values):
            size = chunk.size
            np.abs(np.multiply(chunk, scale, out=scaled[:size]), out=scaled[:size])
            np.copyto(bins[:size], scaled[:size], casting="unsafe")
            self.counts += np.bincount(bins[:size], minlength=BINS)
            self.zeros += size - int(np.count_nonzero(chunk != 0))

    def merge(self, other: "Histogram") -> None:
        """Count what `other` counted. Exactly as if its values had been added here."""
        if not other.total:
            return
        self._cover(other.low, other.high, other.width)
        self.counts += _widened(other.counts, other.width, self.width)
        self.zeros += other.zeros

    def _cover(self, low: float, high: float, width: float) -> None:
        """Make room for values from `low` to `high`, which need bins of at least `width`."""
        empty = not self.total
        self.low = low if empty else min(self.low, low)
        self.high = high if empty else max(self.high, high)
        if width > self.width:
            self.counts = _widened(self.counts, self.width, width)
            self.width = width

    def state(self) -> dict[str, np.ndarray | float | int]:
        """All there is to know of the histogram, for a cache: `counts`, `width`, `low`, `high` and `zeros`."""
        return {"counts": self.counts.copy(), "width": self.width, "low": self.low, "high": self.high, "zeros": self.zeros}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray | float | int]) -> "Histogram":
        """The histogram whose `state()` this is; numbers may have become arrays of no dimension.

        Raises HistogramError for what is not the state of a histogram.
        """
        histogram = cls()
        try:
            counts = np.asarray(state["counts"])
            histogram.width, histogram.low, histogram.high = (float(state[name]) for name in ("width", "low", "high"))
            histogram.zeros = int(state["zeros"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise HistogramError(f"not the state of a histogram: {error!r}") from error
        if counts.shape != (BINS,) or counts.dtype != np.int64 or counts.min() < 0:
            raise HistogramError(
                f"not the state of a histogram: expected {BINS} int64 counts of 0 or more, not {counts.shape} {counts.dtype}"
            )
        histogram.counts = counts.copy()
        known = (histogram.width, histogram.low, histogram.high, float(histogram.zeros))
        fits = all(map(math.isfinite, known)) and histogram.low <= histogram.high and 0 <= histogram.zeros <= counts[0]
        if fits and histogram.total:
            last = int(histogram.amax / histogram.width) if histogram.width else 0
            fits = histogram.width == _width(histogram.amax) and int(np.flatnonzero(counts)[-1]) == last
        else:
            fits = fits and histogram.width == histogram.amax == 0
        if not fits:
            raise HistogramError("not the state of a histogram: width, low, high, zeros and counts contradict one another")
        return histogram


def _width(amax: float) -> float:
    """The bin width of a histogram whose largest magnitude is `amax`: its range is the smallest power of two above it."""
    if not amax:
        return 0.0
    return math.ldexp(1 / BINS, max(math.frexp(amax)[1], LOWEST_EXPONENT))


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
