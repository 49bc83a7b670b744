"""Where two artifacts differ: the inputs that they answer differently, those with most of a difference first."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.decode import Detections
from deploy.words import as_utf8

KEPT = 48
"""The most different inputs whose answers are kept for pictures."""

SHOWN_SCORE = 0.3
"""Boxes below are not looked at."""
SAME_IOU = 0.5
"""From this overlap on, two boxes of one class are the same."""

_MOST_LISTED = 1000


@dataclass(frozen=True, kw_only=True)
class Differing:
    """An input with the answers of both artifacts.

    amount: how much they differ, from 0: for classifiers the share that the two give to each other's class less than to their
    own, for masks the share of the pixels, for boxes how many only one of them has, else the largest difference of a number.
    answer, other: in words, of the artifact and of the one that it is compared with; right: the label in words, where there is one.
    drawn: both answers as they are (class maps or boxes), for the most different inputs.
    """

    path: Path
    amount: float
    answer: str
    other: str
    right: str | None = None
    drawn: tuple[Any, Any] | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        document = {"path": as_utf8(self.path), "amount": self.amount, "answer": self.answer, "other": self.other}
        return document if self.right is None else {**document, "right": self.right}


class Differences:
    """The inputs on which two artifacts differ, collected batch by batch. names: of the classes, where there are any."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names = names
        self._found: list[Differing] = []
        self._kept: list[tuple[float, int]] = []

    def add(self, files: Sequence[Path], answers: Any, others: Any, targets: Any) -> None:
        """Take a batch: what was read of both artifacts' outputs (see `scoring`), and the targets."""
        for row, path in enumerate(files):
            found = self._of(path, _row(answers, row), _row(others, row), None if targets is None else _row(targets, row))
            if found is None or found.amount == 0:
                continue
            self._found.append(found)
            self._keep(len(self._found) - 1)

    def _keep(self, index: int) -> None:
        """Drop the answers of the least different input where more than KEPT have some."""
        if self._found[index].drawn is None:
            return
        heapq.heappush(self._kept, (self._found[index].amount, index))
        if len(self._kept) > KEPT:
            _, least = heapq.heappop(self._kept)
            found = self._found[least]
            self._found[least] = Differing(
                path=found.path, amount=found.amount, answer=found.answer, other=found.other, right=found.right
            )

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Differing]:
        """The most different first, at most 1,000."""
        return iter(sorted(self._found, key=lambda each: -each.amount)[:_MOST_LISTED])

    def _of(self, path: Path, answer: Any, other: Any, target: Any) -> Differing | None:
        if isinstance(answer, Detections):
            return self._boxes(path, answer, other)
        if isinstance(answer, dict):
            return _numbers(path, answer, other)
        if answer.ndim == 1 and answer.dtype.kind == "f" and (target is None or np.ndim(target) == 0):
            return self._classes(path, answer, other, target)
        if answer.ndim == 2 and answer.dtype.kind in "iu":
            share = float((answer != other).mean())
            text = f"{share:.2%} of the pixels differ"
            return Differing(path=path, amount=share, answer=text, other=text, drawn=(_small(answer), _small(other)))
        return _numbers(path, {"": answer}, {"": other})

    def _classes(self, path: Path, answer: np.ndarray, other: np.ndarray, target: Any) -> Differing | None:
        first, second = int(answer.argmax()), int(other.argmax())
        if first == second:
            return None
        shares, others = _softmax(answer), _softmax(other)
        return Differing(
            path=path,
            amount=float(shares[first] - shares[second] + others[second] - others[first]),
            answer=f"{self._name(first)} {shares[first]:.1%}",
            other=f"{self._name(second)} {others[second]:.1%}",
            right=None if target is None else self._name(int(target)),
        )

    def _boxes(self, path: Path, answer: Detections, other: Detections) -> Differing:
        answer, other = shown(answer), shown(other)
        alone = unmatched(answer, other) + unmatched(other, answer)
        return Differing(
            path=path, amount=float(alone), answer=self._listed(answer), other=self._listed(other), drawn=(answer, other)
        )

    def _listed(self, found: Detections) -> str:
        return ", ".join(f"{self._name(int(label))} {score:.0%}" for score, label in zip(*found[1:], strict=True)) or "nothing"

    def _name(self, index: int) -> str:
        return self._names[index] if self._names and 0 <= index < len(self._names) else str(index)


def shown(found: Detections, least: float = SHOWN_SCORE) -> Detections:
    """The boxes with a score of `least` or more."""
    return Detections(*(part[found.scores >= least] for part in found))


def unmatched(found: Detections, others: Detections) -> int:
    """How many boxes have no partner of their class among `others`, which each box may have one of, the likeliest first."""
    free = np.ones(len(others.scores), bool)
    alone = 0
    for box, label in zip(found.boxes, found.labels, strict=True):
        low, high = np.maximum(box[:2], others.boxes[:, :2]), np.minimum(box[2:], others.boxes[:, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        union = np.prod(box[2:] - box[:2]) + np.prod(others.boxes[:, 2:] - others.boxes[:, :2], axis=1) - shared
        overlap = np.where(free & (others.labels == label), shared / np.maximum(union, 1e-9), 0)
        if len(overlap) and overlap.max() >= SAME_IOU:
            free[overlap.argmax()] = False
        else:
            alone += 1
    return alone


def _numbers(path: Path, answer: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> Differing:
    amount = max(float(np.abs(answer[name].astype(np.float64) - other[name]).max(initial=0)) for name in answer)
    text = f"differs by up to {amount:.3g}"
    return Differing(path=path, amount=amount, answer=text, other=text)


def _row(batch: Any, row: int) -> Any:
    return {name: array[row] for name, array in batch.items()} if isinstance(batch, dict) else batch[row]


def _small(classes: np.ndarray) -> np.ndarray:
    return classes.astype(np.uint8) if classes.max(initial=0) < 256 else classes


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(powers / powers.sum())
