"""Mean intersection over union of class maps."""

import numpy as np

from deploy.evaluation.intervals import bootstrap
from deploy.evaluation.metric import ClassScore, Confusion, Metric, class_names, worst_confusions


class MeanIoU(Metric):
    """The mean over the classes of intersection over union, in per cent, over all pixels of all images but those to ignore.

    A class that neither the masks nor the predictions have is left out of the mean, and so is the class to ignore, if it is one, as
    torchmetrics does. Everingham et al. 2010 (The PASCAL visual
    object classes challenge, IJCV 88), section 4.1.
    """

    name = "miou"

    def __init__(self, classes: int, ignore: int, names: list[str] | None = None) -> None:
        self._classes = classes
        self._ignore = ignore
        self._names = class_names(names, classes)
        self._matrix = np.zeros((classes, classes), np.int64)
        self._shared: list[np.ndarray] = []
        self._either: list[np.ndarray] = []

    def update(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        """Take predicted class maps and masks, both (N, H, W) integers."""
        for predicted, mask in zip(outputs, targets, strict=True):
            seen = mask != self._ignore
            pairs = mask[seen].astype(np.int64) * self._classes + predicted[seen]
            matrix = np.bincount(pairs, minlength=self._classes**2).reshape(self._classes, self._classes)
            shared = np.diag(matrix)
            self._matrix += matrix
            self._shared.append(shared)
            either = matrix.sum(axis=0) + matrix.sum(axis=1) - shared
            either[np.arange(self._classes) == self._ignore] = 0
            self._either.append(either)

    @property
    def images(self) -> int:
        return len(self._shared)

    def compute(self) -> float:
        return float(_mean_iou(np.sum(self._shared, axis=0)[None], np.sum(self._either, axis=0)[None])[0])

    def resampled(self) -> np.ndarray:
        shared, either = np.array(self._shared, np.float64), np.array(self._either, np.float64)
        return bootstrap(self.images, lambda weights: _mean_iou(weights @ shared, weights @ either))

    def by_class(self) -> list[ClassScore]:
        shared, either = np.sum(self._shared, axis=0), np.sum(self._either, axis=0)
        return [
            ClassScore(name=name, value=100 * float(hit) / float(both) if both else None, count=int(count))
            for name, hit, both, count in zip(self._names, shared, either, self._matrix.sum(axis=1), strict=True)
        ]

    def confusions(self) -> list[Confusion]:
        return worst_confusions(self._matrix, self._names)


def _mean_iou(shared: np.ndarray, either: np.ndarray) -> np.ndarray:
    """The mean of (B, classes) over the classes that there are, in per cent; NaN where there are none."""
    there = either > 0
    shares = np.divide(shared, either, out=np.zeros(shared.shape), where=there)
    count = there.sum(axis=1)
    return np.asarray(100 * np.divide(shares.sum(axis=1), count, out=np.full(len(count), np.nan), where=count > 0))
