"""Top-1 and top-5 accuracy."""

from typing import Self

import numpy as np

from deploy.evaluation.intervals import Interval, images_for_drop, paired_drop, wilson
from deploy.evaluation.metric import ClassScore, Confusion, Metric, class_names, worst_confusions


class TopK(Metric):
    """The share of images whose class is among the `k` likeliest, in per cent; a NaN is never right.

    ranks: (images,) the number of classes before the right one. predicted, labels: (images,) indices of classes.
    """

    def __init__(self, k: int, names: list[str] | None = None) -> None:
        self.name = f"top{k}"
        self._k = k
        self._names = names
        self.classes = 0
        self._ranks: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._predicted: list[np.ndarray] = []

    def update(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        """Take logits (N, classes) and the indices of the right classes (N,)."""
        self._ranks.append(ranks(outputs, targets))
        self._labels.append(targets)
        self._predicted.append(outputs.argmax(axis=1))
        self.classes = max(self.classes, outputs.shape[1])

    @property
    def ranks(self) -> np.ndarray:
        return np.concatenate(self._ranks) if self._ranks else np.zeros(0, np.int64)

    @property
    def images(self) -> int:
        return len(self.ranks)

    @property
    def right(self) -> np.ndarray:
        """(images,) whether each counts."""
        return np.asarray(self.ranks < min(self._k, self.classes))

    def compute(self) -> float:
        return 100 * float(self.right.mean()) if self._ranks else float("nan")

    def interval(self) -> Interval:
        return Interval(*wilson(int(self.right.sum()), self.images))

    def loss(self, before: Self) -> float:
        return paired_drop(before.right, self.right)[0]

    def loss_interval(self, before: Self) -> Interval:
        _, low, high = paired_drop(before.right, self.right)
        return Interval(low, high)

    def images_to_decide(self, before: Self, limit: float) -> int | None:
        return images_for_drop(before.right, self.right, limit)

    def by_class(self) -> list[ClassScore]:
        labels, right = np.concatenate(self._labels), self.right
        counts = np.bincount(labels, minlength=self.classes)
        found = np.bincount(labels[right], minlength=self.classes)
        return [
            ClassScore(name=name, value=100 * int(hit) / int(count) if count else None, count=int(count))
            for name, count, hit in zip(class_names(self._names, self.classes), counts, found, strict=True)
        ]

    def confusions(self) -> list[Confusion]:
        matrix = np.zeros((self.classes, self.classes), np.int64)
        np.add.at(matrix, (np.concatenate(self._labels), np.concatenate(self._predicted)), 1)
        return worst_confusions(matrix, class_names(self._names, self.classes))


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The number of classes before the right one, (N,), for logits (N, classes) and labels (N,). A NaN is never right."""
    right = logits[np.arange(len(labels)), labels][:, None]
    before = ~(logits <= right)  # greater ones, and all comparisons with a NaN
    before |= (logits == right) & (np.arange(logits.shape[1]) < labels[:, None])
    return np.asarray(before.sum(axis=1))
