"""An error of a tensor, and whether it counts: held against what rounding at random does to the tensor."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BEYOND = 2.0
"""How many times the floor an error must be to count."""

CLEAN = 1.3
"""How many times the floor it is at most in layers without a fault."""

_SIGMAS, _SIGMAS_OF_SLICES = 3.0, 5.0
_OF_SLICES = 3.0
"""How many times as far a slice may be beyond its floor as the whole: what the rounding of a channel's weights does to it is one
draw, the same at every position, and there are many channels."""
_SMALLEST = 2.0**-26
"""Of a slice's floor, against the whole tensor: below half a unit in the last place of FP32 nothing is said."""
_LEAST_OF_WHOLE = 0.5
"""Of a slice's floor, against that of the whole tensor: what is far below that is lost in the noise of the others."""

_LEAST_TO_FIT = 16
"""Elements of a channel that a factor and an offset are fitted to."""
_FIT_ULPS = 2.0**-22
"""What rounding in FP32 may do to a channel of large values that is scaled and shifted back, against these values."""

_BLOCK = 1 << 18
"""Elements whose errors are added up at a time: they stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class Error:
    """How far a tensor is off, and how far rounding may bring it.

    error: the root mean square of the difference, over that of A's tensor; of integers and booleans, the share that differs.
    floor: the same of A's own layers rounded at random in B's formats.
    times: by how many times the error is beyond the floor, in the channel, row or the whole where that is most.
    left: what is left of `times` once each channel is scaled and shifted: little, where the tensor is A's in other units.
    """

    error: float
    floor: float
    times: float
    left: float = math.inf

    @property
    def beyond(self) -> bool:
        return self.times > BEYOND

    @property
    def scaled(self) -> bool:
        """Whether it is beyond the floor, and nothing but other units."""
        return self.times > CLEAN >= self.left


def judged(actual: np.ndarray, rounded: Sequence[np.ndarray], exact: np.ndarray, middle: np.ndarray | None = None) -> Error:
    """`actual` against `exact`, and against how far `rounded`, the same layers rounded at random, are from `middle`.

    middle: those layers without it; None: `exact`.
    """
    if actual.shape != exact.shape:
        return Error(error=math.inf, floor=0.0, times=math.inf)
    if exact.dtype.kind in "biu":
        differing = float(np.mean(actual != exact)) if exact.size else 0.0
        floor = (
            float(np.mean([np.mean(each != (exact if middle is None else middle)) for each in rounded])) if exact.size else 0.0
        )
        least = 1 / max(1, exact.size)
        return Error(error=differing, floor=floor, times=differing / max(floor, least) if differing > least else 0.0)
    finite = exact if np.isfinite(exact).all() else exact[np.isfinite(exact)]
    scale = (float(np.sqrt(np.mean(np.square(finite, dtype=np.float64)))) if finite.size else 0.0) or 1.0
    middle = exact if middle is None else middle
    sums = _sums(actual, rounded, exact, middle)
    whole = sums[0]
    error, noise = (math.sqrt(float(each) / max(1, exact.size)) for each in (whole[0], whole[1] / len(rounded)))
    if not math.isfinite(error):
        return Error(error=math.inf, floor=noise / scale, times=math.inf)
    least = max(_SMALLEST * scale, _LEAST_OF_WHOLE * noise)
    times = _most(sums, exact.size, len(rounded), least)
    left = min(
        (
            _most(_sums(fitted, rounded, exact, middle), exact.size, len(rounded), max(least, rounding))
            for fitted, rounding in (_fitted(actual, exact) if times > CLEAN else ())
        ),
        default=math.inf,
    )
    return Error(error=error / scale, floor=noise / scale, times=times, left=left)


def _fitted(actual: np.ndarray, exact: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """`actual` with a factor and an offset for each channel that bring it nearest to `exact`, and how far FP32 rounds the result.

    Channels are an axis, or two of a tensor of four: attention has heads and their channels.
    """
    rank = exact.ndim
    kept = {(1,), (rank - 1,), (1, rank - 1), (1, 2)} if rank == 4 else {(rank - 1,), (1,)}
    for channels in sorted(kept):
        others = tuple(axis for axis in range(rank) if axis not in channels)
        if not others or max(channels) >= rank or math.prod(exact.shape[axis] for axis in others) < _LEAST_TO_FIT:
            continue
        given, wanted = (array.astype(np.float64) for array in (actual, exact))
        with np.errstate(invalid="ignore", over="ignore"):
            given -= given.mean(axis=others, keepdims=True)
            middle = wanted.mean(axis=others, keepdims=True)
            product = np.mean(given * (wanted - middle), axis=others, keepdims=True)
            factor = product / np.maximum(np.mean(np.square(given), axis=others, keepdims=True), 1e-300)
            rounding = _FIT_ULPS * float(np.sqrt(np.mean(np.square(factor * actual))))
            yield factor * given + middle, rounding if math.isfinite(rounding) else 0.0


def _most(sums: Sequence[np.ndarray], size: int, draws: int, least: float) -> float:
    return max(_times(each, size, draws, least) for each in sums)


def _sums(actual: np.ndarray, rounded: Sequence[np.ndarray], exact: np.ndarray, middle: np.ndarray) -> list[np.ndarray]:
    """Over all elements, and over all of each channel of images and of vectors: the sums of the squared error, of the squared errors
    of `rounded`, and of their squares. Shapes [3], [3, channels].
    """
    rank = exact.ndim
    axes = sorted({axis for axis in (1, rank - 1) if 0 < axis < rank})
    sums = [np.zeros(3), *(np.zeros((3, exact.shape[axis])) for axis in axes)]
    rows = max(1, _BLOCK * len(exact) // max(1, exact.size)) if rank else 1
    for block in (slice(start, start + rows) for start in range(0, len(exact), rows)) if rank else [...]:
        error = np.square(_off(actual[block], exact[block]))
        noise = [np.square(_off(each[block], middle[block])) for each in rounded]
        parts = (error, sum(noise), sum(np.square(each) for each in noise))
        sums[0] += [np.sum(part) for part in parts]
        for axis, total in zip(axes, sums[1:], strict=True):
            total += [np.sum(part, axis=tuple(other for other in range(rank) if other != axis)) for part in parts]
    return sums


def _times(sums: np.ndarray, size: int, draws: int, least: float) -> float:
    """The largest ratio of error to floor, which is at least `least`, over slices, less what chance makes of their few elements.

    The root mean square of n independent errors scatters by 1 / sqrt(2 n) of itself, so that of two the logarithm of their ratio
    scatters by 1 / sqrt(n): the ratio must be beyond exp(3 / sqrt(n)), or of the
    largest of many slices exp(5 / sqrt(n)). Of errors of different size, n = (sum e^2)^2 / sum e^4.
    """
    if not size:
        return 0.0
    elements = size / max(1, sums[0].size)
    error, noise = np.sqrt(sums[0] / elements), np.sqrt(sums[1] / elements / draws)
    with np.errstate(invalid="ignore"):
        count = np.square(sums[1]) / np.maximum(sums[2], 1e-300) / draws
    sigmas = _SIGMAS if sums.ndim == 1 else _SIGMAS_OF_SLICES
    times = error / np.maximum(noise, least) / np.exp(sigmas / np.sqrt(np.fmax(count, 1.0)))
    return float(np.max(times)) / (1.0 if sums.ndim == 1 else _OF_SLICES)


def _off(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The difference, 0 where both are the same infinity or NaN; infinite where one alone is not finite."""
    with np.errstate(invalid="ignore"):
        off = np.asarray(np.subtract(actual, exact, dtype=np.float64))
        if np.isfinite(off.sum()):
            return off
        odd = ~np.isfinite(off)
    same = (actual == exact) | (np.isnan(actual) & np.isnan(exact))
    off[odd] = np.where(same[odd], 0.0, np.inf)
    return off
