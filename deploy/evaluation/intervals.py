"""Intervals of scores and of paired differences, and how many images would decide.

All are of 95 %. Two artifacts are always compared on the same images, resampled in the same way.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""

RESAMPLES = 1000
"""Draws of a bootstrap."""

GROUPS = 10
"""Parts of the data of a jackknife."""

_T95 = 2.262157
"""Two-sided 95 % quantile of Student's t with GROUPS - 1 degrees of freedom."""

_SEED = 20261126
_CERTAIN_ENOUGH = 1 << 40


class Interval(NamedTuple):
    low: float
    high: float


def paired_drop(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """The points of accuracy lost, and the ends of the 95 % interval; before, after: (images,) bool, whether each is right.

    The interval is that of Bonett and Price 2012 (Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data, J. Educ. Behav. Stat. 37(4)): it holds for few images, and without disagreement.
    """
    count = len(before)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    low, high = _bonett_price(lost, won, count)
    return 100 * (lost - won) / count, low, high


def _bonett_price(lost: float, won: float, count: float) -> Interval:
    p, q = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    margin = Z95 * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
    return Interval(100 * max(p - q - margin, -1.0), 100 * min(p - q + margin, 1.0))


def images_to_certify(limit: float) -> int | None:
    """The fewest images whose `paired_drop` can end within `limit` points: where all answers are the same. None where no number can."""
    if not limit > 0:
        return None
    low, high = 0, 1
    while _bonett_price(0, 0, high).high > limit:
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _bonett_price(0, 0, middle).high <= limit else (middle, high)
    return high


def images_for_drop(before: np.ndarray, after: np.ndarray, limit: float) -> int | None:
    """How many more images would bring the upper end of `paired_drop` within `limit` points, if they went on as these do.

    None where no number would: the drop itself is the limit.
    """
    count = len(before)
    lost, won = int((before & ~after).sum()) / count, int((~before & after).sum()) / count
    if 100 * (lost - won) >= limit:
        return None

    def enough(images: int) -> bool:
        return _bonett_price(lost * images, won * images, images).high <= limit

    most = count
    while not enough(most):
        most *= 2
        if most > _CERTAIN_ENOUGH:
            return None
    least = most // 2
    while least + 1 < most:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return max(most - count, 1)


def images_for_loss(loss: float, high: float, limit: float, count: int) -> int | None:
    """How many images more than `count` would bring the upper end `high` of a loss within `limit`; None where no number would.

    The width of an interval goes with one over the square root of their number.
    """
    if loss >= limit:
        return None
    return max(math.ceil(count * ((high - loss) / (limit - loss)) ** 2) - count, 1)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The ends of the 95 % interval of an accuracy in per cent, of `count` images of which `right` are right.

    The score interval of Wilson 1927 (Probable inference, the law of succession, and statistical inference, J. Am. Stat.
    Assoc. 22(158)): it holds for few images, and where all or none are right.
    """
    share, z2 = right / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    margin = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return 100 * (centre - margin) if right else 0.0, 100 * (centre + margin) if right < count else 100.0


def bootstrap(count: int, score: Callable[[np.ndarray], np.ndarray], draws: int = RESAMPLES) -> np.ndarray:
    """Scores of `draws` resamples of `count` images, (draws,): the same resamples for the same numbers, always.

    score: from weights (B, count), how often each image was drawn, to scores (B,). Efron and Tibshirani 1993 (An Introduction
    to the Bootstrap), chapter 6.
    """
    rng = np.random.default_rng(_SEED)
    block = max(1, (1 << 24) // max(count, 1))
    scores = []
    for start in range(0, draws, block):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=min(block, draws - start))
        scores.append(score(weights.astype(np.float64)))
    return np.concatenate(scores)


def percentiles(scores: np.ndarray) -> Interval | None:
    """The percentile interval of resampled scores; None where there are none that are numbers."""
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return None
    low, high = np.percentile(scores, [2.5, 97.5])
    return Interval(float(low), float(high))


def jackknife(whole: float, parts: np.ndarray) -> Interval | None:
    """The interval of a score from those without each of GROUPS parts of the data; None where one is no number.

    The delete-a-group jackknife: Kott 2001 (The delete-a-group jackknife, J. Off. Stat. 17(4)).
    """
    if not np.isfinite(parts).all() or len(parts) < GROUPS:
        return None
    margin = _T95 * math.sqrt((GROUPS - 1) / GROUPS * float(np.square(parts - parts.mean()).sum()))
    return Interval(whole - margin, whole + margin)
