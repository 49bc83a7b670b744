"""The damage that a lower precision does to the outputs, measured without labels.

Damages of independent small errors add up: both measures are of second order in the error, and errors of different layers do not
correlate.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from deploy.artifact.tensors import Feed
from deploy.evaluation.classifier import softmax

Kind = Literal["kl", "relative"]
WORST = 1e9
"""The damage of outputs that are no numbers, or where there should be nothing but 0."""


def damage(expected: Sequence[Feed], found: Sequence[Feed], kind: Kind) -> float:
    """How far the outputs `found` are from those `expected` of the network in floating point, feed by feed; 0 for no difference.

    kl: of classifiers, with one output of logits (N, classes): the Kullback-Leibler divergence of their probabilities, in nats, averaged
    over the rows. relative: the sum of the squared differences over that of the squared numbers, averaged over the outputs that are
    not integers. At most `WORST`.
    """
    if kind == "kl":
        rows = np.concatenate([_divergences(*pair) for pair in _pairs(expected, found)])
        return min(float(rows.mean()), WORST) if np.isfinite(rows).all() else WORST
    names = [name for name, array in expected[0].items() if array.dtype.kind == "f"]
    return float(
        np.mean([_relative([(feed[name], other[name]) for feed, other in zip(expected, found, strict=True)]) for name in names])
    )


def _pairs(expected: Sequence[Feed], found: Sequence[Feed]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    for feed, other in zip(expected, found, strict=True):
        (name,) = feed
        yield feed[name], other[name]


def _divergences(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(N,) sum p (log p - log q); 0 where p is 0."""
    p, q = softmax(expected), softmax(found)
    tiny = np.finfo(np.float64).tiny
    return np.asarray((p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))).sum(axis=1))


def _relative(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    squares = sum(float(np.square(each, dtype=np.float64).sum()) for each, _ in pairs)
    off = sum(float(np.square(np.subtract(other, each, dtype=np.float64)).sum()) for each, other in pairs)
    if not off:
        return 0.0
    return min(off / squares, WORST) if np.isfinite(off) and squares else WORST
