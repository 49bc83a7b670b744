"""What a metric is: it takes outputs and targets batch by batch, and gives one number of them with its interval."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from deploy.evaluation.intervals import Interval, images_for_loss, percentiles

Kind = Literal["classes", "masks", "boxes", "arrays"]
"""What the targets of some data are; `arrays` are those of .npz files as they are."""


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """The score of one class, and the images, pixels or boxes of it that there are; None where there are none of it."""

    name: str
    value: float | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often `actual` was taken for `predicted`: images, or pixels."""

    actual: str
    predicted: str
    count: int


class Metric(ABC):
    """A score of an artifact on some data, filled batch by batch.

    name: as it is asked for. unit: of its values and of what may be lost, `%`, `dB` or "". lower: less is better.
    default_drop: what may be lost where nothing is said; None where that must be said.
    """

    name: str
    unit: ClassVar[str] = "%"
    lower: bool = False
    default_drop: ClassVar[float | None] = 1.0

    @abstractmethod
    def update(self, outputs: Any, targets: Any) -> None:
        """Take a batch: what was read of the model's outputs, and the targets of the same images."""

    @abstractmethod
    def compute(self) -> float:
        """The score of all that was taken; NaN where nothing can be said."""

    @property
    @abstractmethod
    def images(self) -> int:
        """How many images were taken."""

    def resampled(self) -> np.ndarray | None:
        """The scores of resamples of the images, the same for every metric of as many images; None where there are none."""
        return None

    def interval(self) -> Interval | None:
        """The 95 % interval of the score."""
        scores = self.resampled()
        return None if scores is None else percentiles(scores)

    def loss(self, before: Self) -> float:
        """How much worse this is than `before`, in the metric's unit."""
        return (self.compute() - before.compute()) * (1 if self.lower else -1)

    def loss_interval(self, before: Self) -> Interval | None:
        """The 95 % interval of `loss`, of the same images resampled in the same way."""
        first, second = before.resampled(), self.resampled()
        if first is None or second is None:
            return None
        return percentiles((second - first) * (1 if self.lower else -1))

    def images_to_decide(self, before: Self, limit: float) -> int | None:
        """How many more images would show that the loss keeps within `limit`; None where no number would."""
        interval = self.loss_interval(before)
        assert interval is not None
        return images_for_loss(self.loss(before), interval.high, limit, self.images)

    def images_to_reach(self, least: float) -> int:
        """How many more images would show that the score is `least` or more, where that is within its interval; -1: no number."""
        interval, value = self.interval(), self.compute()
        assert interval is not None
        return images_for_loss(-value, -interval.low, -least, self.images) or -1

    def by_class(self) -> list[ClassScore]:
        """The score of every class; none where the metric has no classes."""
        return []

    def confusions(self) -> list[Confusion]:
        """What was taken for what, the most frequent first; none where the metric does not know."""
        return []


def worst_confusions(matrix: np.ndarray, names: list[str]) -> list[Confusion]:
    """The pairs of a confusion matrix (actual, predicted) that are wrong and occur, the most frequent first."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
    return [
        Confusion(actual=names[actual], predicted=names[predicted], count=int(wrong[actual, predicted]))
        for actual, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True)
    ]


def class_names(names: list[str] | None, count: int) -> list[str]:
    """The names of `count` classes: their indices where there are none."""
    return list(names) if names else [str(index) for index in range(count)]
