"""From what a detector gives to boxes: part of the manifest, beside the preprocessing. Non-maximum suppression is done here.

`yolo` reads one output, in one of three forms (A: the number of anchors, C: of classes, pixels: of the model's input):

    N x (4 + C) x A     centre x, centre y, width, height in pixels, and a score a class (YOLOv8 and later)
    N x A x (5 + C)     the same with a score for any object before those of the classes, which it multiplies (YOLOv5)
    N x K x 6           x1, y1, x2, y2 in pixels, score, class: suppressed already (YOLOv10, and NMS inside the graph)

`ssd` reads two: boxes N x A x 4, corners x1, y1, x2, y2 in pixels, and scores N x A x (1 + C) with the background first: logits,
or probabilities where every row is between 0 and 1 and adds up to 1. A function of the user's gets the outputs by name and returns
one (boxes, scores, labels) an image, boxes as corners in pixels, labels as indices of classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from deploy.artifact.tensors import TensorSpec, format_specs
from deploy.artifact.usercode import UserFunction
from deploy.errors import UsageError, UserCodeError
from deploy.words import a_type

Format = Literal["yolo", "ssd"]

NMS_IOU = {"yolo": 0.7, "ssd": 0.45}
"""From this overlap on, the less likely of two boxes of one class is dropped: Ultralytics' and torchvision's SSD's own values."""

LEAST_SCORE = 0.001
"""Boxes below count for nothing: what Ultralytics' `val` leaves out."""

MOST_CANDIDATES = 3000
"""Boxes before the suppression, the likeliest."""
MOST = 100
"""Boxes of one image after it, as many as COCO's metric looks at."""

_SUM = 1e-3


class Detections(NamedTuple):
    """Boxes of one image, the likeliest first: (n, 4) corners, (n,) scores 0 to 1, (n,) indices of classes."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Decode:
    """How boxes come out of the outputs: a `format`, or a `function` of the user's, whose file is in the artifact."""

    format: Format | None = None
    function: UserFunction | None = None

    def __post_init__(self) -> None:
        if (self.format is None) == (self.function is None) or self.format not in (None, *get_args(Format)):
            raise UsageError(f"decode: expected yolo, ssd or a function, not {self.format!r}")

    @classmethod
    def load(cls, spec: str) -> "Decode":
        """From `yolo`, `ssd`, `FILE.py:FUNCTION` or `pkg.mod:FUNCTION`. Raises UsageError, and what `UserFunction.read` raises."""
        if spec in get_args(Format):
            return cls(format=spec)  # type: ignore[arg-type]  # it is one of them
        if ":" not in spec:
            raise UsageError(f"unknown decode {spec!r}; expected yolo, ssd, FILE.py:FUNCTION or pkg.mod:FUNCTION")
        return cls(function=UserFunction.read(spec))

    def __str__(self) -> str:
        return str(self.function or self.format)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, outputs: Sequence[TensorSpec], classes: int | None) -> None:
        """Raise UsageError where no boxes can be read from outputs like these; classes: how many names there are, if any."""
        if self.format == "yolo":
            _yolo_form(outputs, classes)
        elif self.format == "ssd":
            _ssd_names(outputs, classes)

    def __call__(
        self, results: Mapping[str, np.ndarray], outputs: Sequence[TensorSpec], classes: int | None, folder: Path | None
    ) -> list[Detections]:
        """The boxes of each image of a batch, in pixels of the model's input; at most `MOST` of each.

        folder: where the function's file is. Raises UserCodeError where the function fails or returns something else.
        """
        if self.function is not None:
            return _checked(self.function, self.function.call(folder, dict(results)), len(next(iter(results.values()))))
        if self.format == "yolo":
            return _yolo(results, outputs, classes)
        return _ssd(results, outputs, classes)


def _yolo_form(outputs: Sequence[TensorSpec], classes: int | None) -> str:
    """`rows`, `columns` or `final`: which of the three forms the only output has."""
    shape = outputs[0].shape if len(outputs) == 1 else ()
    if len(shape) == 3:
        _, second, third = shape
        if third == 6 and classes not in (1, None):
            return "final"
        if second == (4 + classes if classes is not None else None):
            return "columns"
        if third == (5 + classes if classes is not None else None):
            return "rows"
        if classes is None and isinstance(second, int) and second > 4 and (not isinstance(third, int) or third > second):
            return "columns"
        if classes is None and isinstance(third, int) and third > 5 and third != 6:
            return "rows"
    known = (
        f" with {classes} classes" if classes is not None else "; with class names (`classes`) it may be clear which form it is"
    )
    raise UsageError(
        f"decode yolo reads one output N x (4 + classes) x anchors, N x anchors x (5 + classes) or N x boxes x 6, and the model gives"
        f" {format_specs(outputs)}{known}"
    )


def _yolo(results: Mapping[str, np.ndarray], outputs: Sequence[TensorSpec], classes: int | None) -> list[Detections]:
    form = _yolo_form(outputs, classes)
    array = results[outputs[0].name].astype(np.float32)
    if form == "final":
        return [_best(Detections(each[:, :4], each[:, 4], each[:, 5].astype(np.int64))) for each in array]
    if form == "columns":
        array = array.transpose(0, 2, 1)
    scores = array[..., 4:] if form == "columns" else array[..., 4:5] * array[..., 5:]
    middle, half = array[..., :2], array[..., 2:4] / 2
    corners = np.concatenate([middle - half, middle + half], axis=-1)
    return [suppressed(boxes, each, NMS_IOU["yolo"]) for boxes, each in zip(corners, scores, strict=True)]


def _ssd_names(outputs: Sequence[TensorSpec], classes: int | None) -> tuple[str, str]:
    """The names of the outputs with the boxes and with the scores."""
    dense = [spec for spec in outputs if len(spec.shape) == 3]
    boxes = [spec for spec in dense if spec.shape[2] == 4]
    boxes = boxes[:1]  # three classes and the background are four columns too: the boxes come first then
    scores = [spec for spec in dense if spec not in boxes]
    if len(boxes) == 1 and len(scores) == 1 and len(outputs) == 2:
        count = scores[0].shape[2]
        if classes is None or not isinstance(count, int) or count == classes + 1:
            return boxes[0].name, scores[0].name
    known = "" if classes is None else f" for {classes} class names"
    raise UsageError(
        f"decode ssd reads two outputs, boxes N x anchors x 4 and scores N x anchors x (1 + classes), and the model gives"
        f" {format_specs(outputs)}{known}"
    )


def _ssd(results: Mapping[str, np.ndarray], outputs: Sequence[TensorSpec], classes: int | None) -> list[Detections]:
    box_name, score_name = _ssd_names(outputs, classes)
    boxes, scores = results[box_name].astype(np.float32), results[score_name].astype(np.float32)
    sums = scores.sum(axis=-1)
    if scores.size and (scores.min() < 0 or np.abs(sums - 1).max() > _SUM):
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores = powers / powers.sum(axis=-1, keepdims=True)
    return [suppressed(each, found[:, 1:], NMS_IOU["ssd"]) for each, found in zip(boxes, scores, strict=True)]


def suppressed(boxes: np.ndarray, scores: np.ndarray, iou: float) -> Detections:
    """Non-maximum suppression, class by class, of boxes (A, 4) with scores (A, C)."""
    anchors, labels = np.nonzero(scores >= LEAST_SCORE)
    values = scores[anchors, labels]
    order = np.argsort(-values, kind="stable")[:MOST_CANDIDATES]
    boxes, values, labels = boxes[anchors[order]], values[order], labels[order]
    kept = [index for label in np.unique(labels) for index in _kept(boxes, np.flatnonzero(labels == label), iou)]
    return _best(Detections(boxes[kept], values[kept], labels[kept].astype(np.int64)))


def _kept(boxes: np.ndarray, order: np.ndarray, iou: float) -> list[int]:
    """Of the boxes at `order`, the likeliest first, those that overlap no likelier one that is kept by more than `iou`."""
    areas = np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)
    kept: list[int] = []
    while len(order) and len(kept) < MOST:
        first, others = order[0], order[1:]
        kept.append(int(first))
        low, high = np.maximum(boxes[first, :2], boxes[others, :2]), np.minimum(boxes[first, 2:], boxes[others, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        union = areas[first] + areas[others] - shared
        order = others[shared <= iou * union]
    return kept


def _best(found: Detections) -> Detections:
    order = np.argsort(-found.scores, kind="stable")[:MOST]
    order = order[found.scores[order] >= LEAST_SCORE]
    return Detections(found.boxes[order], found.scores[order], found.labels[order])


def _checked(function: UserFunction, found: Any, rows: int) -> list[Detections]:
    """What the user's function returned, for `rows` images."""
    what = f"{function} must return one (boxes, scores, labels) an image"
    if not isinstance(found, list | tuple) or len(found) != rows:
        raise UserCodeError(f"{what}; for {rows} images it returns {a_type(found)}{_length(found)}")
    detections = []
    for each in found:
        if not isinstance(each, list | tuple) or len(each) != 3:
            raise UserCodeError(f"{what}; for one image it returns {a_type(each)}{_length(each)}")
        boxes, scores, labels = (np.asarray(part) for part in each)
        count = len(scores) if scores.ndim == 1 else -1
        if boxes.size == 0:
            boxes = boxes.reshape(0, 4)
        if boxes.shape != (count, 4) or labels.shape != (count,) or (count and labels.dtype.kind not in "iu"):
            raise UserCodeError(
                f"{what}, of shapes (n, 4), (n,) and (n,) with labels of integers; it returns {boxes.shape}, {scores.shape} and"
                f" {labels.shape} {labels.dtype}"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise UserCodeError(f"{function} returns NaN or infinity")
        detections.append(_best(Detections(boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int64))))
    return detections


def _length(value: Any) -> str:
    return f" of {len(value)}" if isinstance(value, list | tuple) else ""
