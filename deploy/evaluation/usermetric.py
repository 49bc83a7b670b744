"""A metric of the user's: an object with `update` and `compute`, such as pytorch-ignite's and torchmetrics' are.

Objects of these two libraries, and all that are modules of torch, get tensors, others numpy arrays. `update` with two parameters
gets outputs and targets, with one a pair of them, as ignite's. Outputs are the array where the model has one output, else
arrays by name; of a detector, one dict an image (`boxes` as corners, `scores`, `labels`), as are its targets.
"""

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.decode import Detections
from deploy.artifact.usercode import UserFunction, user_line
from deploy.data.coco import Boxes
from deploy.errors import UserCodeError
from deploy.evaluation.intervals import GROUPS, Interval, jackknife
from deploy.evaluation.metric import Metric
from deploy.words import a_type

_TENSORS = ("torch", "ignite", "torchmetrics")


class UserMetric(Metric):
    """The user's object, and one for each of ten parts of the images, which is given all but that part: the interval.

    There is none where the function returns the same object every time, or for fewer than ten images.
    """

    unit = ""
    default_drop = None

    def __init__(self, name: str, function: UserFunction, folder: Path | None, *, lower: bool) -> None:
        self.name, self.lower = name, lower
        self._function, self._folder = function, folder
        self._whole = self._made()
        self._reset(self._whole)
        self._parts = [self._made() for _ in range(GROUPS)]
        if any(part is self._whole for part in self._parts):
            self._parts = []
            if not callable(getattr(self._whole, "reset", None)):
                raise UserCodeError(f"{name} returns the same object every time, and it has no reset(); make a new one each time")
        self._images = 0
        self._value: float | None = None
        self._scores: np.ndarray | None = None
        self._tensors = any(base.__module__.partition(".")[0] in _TENSORS for base in type(self._whole).__mro__)
        self._pair = _takes_a_pair(self._whole)

    @property
    def images(self) -> int:
        return self._images

    def update(self, outputs: Any, targets: Any) -> None:
        """Take a batch: outputs and targets of N images, arrays (or arrays by name, or one dict an image) with N rows."""
        count = len(targets)
        groups = (np.arange(count) + self._images) % GROUPS
        self._give(self._whole, outputs, targets)
        for group, part in enumerate(self._parts):
            rows = np.flatnonzero(groups != group)
            if len(rows):
                self._give(part, _rows(outputs, rows), _rows(targets, rows))
        self._images += count
        self._value = self._scores = None

    def compute(self) -> float:
        """Raises UserCodeError where the user's `compute` fails, or gives no number or NaN."""
        if self._value is None:
            self._value = self._number(self._whole)
            if not np.isfinite(self._value):
                raise UserCodeError(f"{self.name}: compute() returns {self._value} for {self._images} images; expected a number")
        return self._value

    def interval(self) -> Interval | None:
        return None if (parts := self._of_parts()) is None else jackknife(self.compute(), parts)

    def loss_interval(self, before: "UserMetric") -> Interval | None:
        own, other = self._of_parts(), before._of_parts()
        if own is None or other is None:
            return None
        return jackknife(self.loss(before), (own - other) * (1 if self.lower else -1))

    def _of_parts(self) -> np.ndarray | None:
        if not self._parts or self._images < GROUPS:
            return None
        if self._scores is None:
            scores = []
            for part in self._parts:
                try:
                    scores.append(self._number(part))
                except UserCodeError:  # of fewer images than the whole, which has a score
                    scores.append(float("nan"))
            self._scores = np.array(scores)
        return self._scores

    def _made(self) -> Any:
        """What the user's function makes, or a copy of what it is, where that is an object with `update` already."""
        found = self._function.load(self._folder)
        if not inspect.isclass(found) and hasattr(found, "update") and hasattr(found, "compute"):
            return copy.deepcopy(found)
        made = self._function.call(self._folder)
        for name in ("update", "compute"):
            if not callable(getattr(made, name, None)):
                raise UserCodeError(
                    f"{self.name} returns {a_type(made)} without {name}(){self._function.line(self._folder)}; expected an object with"
                    " update(outputs, targets) and compute()"
                )
        return made

    def _reset(self, made: Any) -> None:
        if callable(getattr(made, "reset", None)):
            self._call("reset", made.reset)

    def _give(self, made: Any, outputs: Any, targets: Any) -> None:
        outputs, targets = self._converted(outputs), self._converted(targets)
        self._call("update", made.update, *([(outputs, targets)] if self._pair else [outputs, targets]))

    def _number(self, made: Any) -> float:
        value = self._call("compute", made.compute)
        try:
            if isinstance(value, dict | str) or value is None:
                raise TypeError
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise UserCodeError(f"{self.name}: compute() returns {a_type(value)}; expected one number{_choice(value)}") from None

    def _call(self, what: str, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:  # the user's code: any error may come
            text = str(error).partition("\n")[0]
            raise UserCodeError(f"{self.name}: {what}() fails: {type(error).__name__}: {text}{user_line(error)}") from error

    def _converted(self, value: Any) -> Any:
        if isinstance(value, Detections):
            return self._converted(value._asdict())
        if isinstance(value, Boxes):
            boxes = {"boxes": value.boxes.astype(np.float32), "labels": value.labels, "iscrowd": value.crowd.astype(np.int64)}
            return self._converted({**boxes, "area": value.areas})
        if isinstance(value, dict):
            return {name: self._converted(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._converted(each) for each in value]
        if not self._tensors:
            return value
        import torch  # the metric's own library has loaded it

        return torch.tensor(value)


def _choice(value: Any) -> str:
    """Of metrics that return many numbers by name, as torchmetrics' of detectors does: which there are."""
    names = [str(name) for name in value][:5] if isinstance(value, dict) else []
    return f": name a class of yours that returns one of {', '.join(map(repr, names))}" if names else ""


def _rows(value: Any, rows: np.ndarray) -> Any:
    if isinstance(value, dict):
        return {name: each[rows] for name, each in value.items()}
    return [value[row] for row in rows] if isinstance(value, list) else value[rows]


def _takes_a_pair(made: Any) -> bool:
    """Whether `update` takes one thing, as ignite's: the pair of outputs and targets."""
    try:
        parameters = inspect.signature(made.update).parameters.values()
    except (TypeError, ValueError):  # of a function in C
        return False
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    many = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    return len([each for each in positional if each.default is each.empty]) == 1 and len(positional) == 1 and not many
