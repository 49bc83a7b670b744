"""COCO's mean average precision of boxes, by pycocotools."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deploy.artifact.decode import Detections
from deploy.data.coco import Boxes
from deploy.evaluation.intervals import bootstrap
from deploy.evaluation.metric import ClassScore, Metric

DRAWS = 500
"""Resamples: each sorts nothing anew, and still adds up all boxes."""


class MeanAveragePrecision(Metric):
    """mAP@[.5:.95] in per cent: the mean over classes and ten overlaps, of all sizes, and of 100 boxes an image.

    Lin et al. 2014 (Microsoft COCO, ECCV). A class without a box in the data is left out of the mean.
    """

    name = "map"

    def __init__(self, classes: Sequence[int], names: Sequence[str]) -> None:
        """classes: the indices that the data has boxes for. names: of all indices."""
        self._classes = sorted(classes)
        self._names = names
        self._found: list[Detections] = []
        self._targets: list[Boxes] = []
        self._done: COCOeval | None = None

    def update(self, outputs: Sequence[Detections], targets: Sequence[Boxes]) -> None:
        """Take what was found in N images and what there is, in pixels of the picture."""
        self._found.extend(outputs)
        self._targets.extend(targets)
        self._done = None

    @property
    def images(self) -> int:
        return len(self._found)

    def compute(self) -> float:
        precision = self._evaluated().eval["precision"][:, :, :, 0, -1]
        there = precision[precision > -1]
        return 100 * float(there.mean()) if there.size else float("nan")

    def by_class(self) -> list[ClassScore]:
        precision = self._evaluated().eval["precision"][:, :, :, 0, -1]
        counts = np.bincount(np.concatenate([each.labels for each in self._targets]), minlength=len(self._names))
        scores = []
        for place, label in enumerate(self._classes):
            there = precision[:, :, place][precision[:, :, place] > -1]
            value = 100 * float(there.mean()) if there.size else None
            scores.append(ClassScore(name=self._names[label], value=value, count=int(counts[label])))
        return scores

    def resampled(self) -> np.ndarray:
        """Scores of resampled images: boxes are matched once, and counted as often as their image was drawn."""
        done = self._evaluated()
        tables = [_Table(done, place, self.images) for place in range(len(self._classes))]

        def score(weights: np.ndarray) -> np.ndarray:
            return np.array([_mean_precision(tables, row, done.params.recThrs) for row in weights])

        return 100 * bootstrap(self.images, score, DRAWS)

    def _evaluated(self) -> COCOeval:
        if self._done is None:
            with redirect_stdout(StringIO()):  # it prints what it does
                truth, found = _index(self._truth(), self._names), _index(self._boxes(), self._names)
                for index in range(self.images):
                    truth.imgs.setdefault(index, {"id": index})
                self._done = COCOeval(truth, found, "bbox")
                self._done.params.imgIds = list(range(self.images))
                self._done.params.catIds = self._classes
                self._done.evaluate()
                self._done.accumulate()
        return self._done

    def _truth(self) -> list[dict[str, Any]]:
        return [
            {"image_id": index, "category_id": int(label), "bbox": _sides(box), "area": float(area), "iscrowd": int(crowd)}
            for index, each in enumerate(self._targets)
            for box, label, area, crowd in zip(each.boxes, each.labels, each.areas, each.crowd, strict=True)
        ]

    def _boxes(self) -> list[dict[str, Any]]:
        return [
            {
                "image_id": index,
                "category_id": int(label),
                "bbox": _sides(box),
                "area": float((box[2] - box[0]) * (box[3] - box[1])),
                "score": float(score),
                "iscrowd": 0,
            }
            for index, each in enumerate(self._found)
            for box, score, label in zip(*each, strict=True)
        ]


def _sides(box: np.ndarray) -> list[float]:
    """x, y, width, height of corners."""
    x1, y1, x2, y2 = map(float, box)
    return [x1, y1, x2 - x1, y2 - y1]


def _index(boxes: list[dict[str, Any]], names: Sequence[str]) -> COCO:
    made = COCO()
    categories = [{"id": index, "name": name} for index, name in enumerate(names)]
    images = [{"id": index} for index in sorted({box["image_id"] for box in boxes})]
    annotations = [{"id": index, **box} for index, box in enumerate(boxes, 1)]
    made.dataset = {"images": images, "categories": categories, "annotations": annotations}
    made.createIndex()
    return made


class _Table:
    """What the evaluation found about one class, of all sizes: its boxes, the likeliest first, and how many there are to find.

    hit, counts: (overlaps, boxes). image: (boxes,). wanted: (images,).
    """

    def __init__(self, done: COCOeval, place: int, images: int) -> None:
        parameters = done.params
        areas = len(parameters.areaRng)
        entries = done.evalImgs[place * areas * images : place * areas * images + images]
        entries = [(index, entry) for index, entry in enumerate(entries) if entry is not None]
        self.wanted = np.zeros(images)
        overlaps = len(parameters.iouThrs)
        scores: list[np.ndarray] = [np.zeros(0)]
        image: list[np.ndarray] = [np.zeros(0, np.int64)]
        matched, ignored = [np.zeros((overlaps, 0), bool)], [np.zeros((overlaps, 0), bool)]
        for index, entry in entries:
            self.wanted[index] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
            scores.append(np.asarray(entry["dtScores"]))
            image.append(np.full(len(entry["dtScores"]), index))
            matched.append(np.asarray(entry["dtMatches"]).reshape(overlaps, -1) > 0)
            ignored.append(np.asarray(entry["dtIgnore"]).reshape(overlaps, -1) > 0)
        order = np.argsort(-np.concatenate(scores), kind="mergesort")
        self.image = np.concatenate(image)[order]
        counts = ~np.concatenate(ignored, axis=1)[:, order]
        self.hit = np.concatenate(matched, axis=1)[:, order] & counts
        self.miss = ~self.hit & counts


def _mean_precision(tables: Sequence[_Table], weights: np.ndarray, recalls: np.ndarray) -> float:
    """The mean over overlaps and classes, 0 to 1, of images that count `weights` (images,) times; NaN without a box to find."""
    means = []
    for table in tables:
        wanted = float(weights @ table.wanted)
        if not wanted:
            continue
        each = weights[table.image]
        hits, misses = np.cumsum(table.hit * each, axis=1), np.cumsum(table.miss * each, axis=1)
        precision = hits / np.maximum(hits + misses, np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = hits / wanted
        for row, best in zip(recall, envelope, strict=True):
            places = np.searchsorted(row, recalls, side="left")
            means.append(np.append(best, 0.0)[np.minimum(places, len(best))].mean())
    return float(np.mean(means)) if means else float("nan")
