"""How near an artifact's outputs are to those of its FP32 parent, without labels: signal to noise, and cosine."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from deploy.artifact.tensors import Feed
from deploy.evaluation.intervals import bootstrap
from deploy.evaluation.metric import Metric


class Fidelity(Metric):
    """`sqnr`, in dB, or `cosine`, of all outputs of numbers that are not integers; of several outputs the worst counts.

    sqnr: 10 log10(sum expected^2 / sum (actual - expected)^2) over all images, infinite where nothing differs. cosine: that of
    each image's output with the expected one, averaged over the images.
    """

    unit = ""
    default_drop = None

    def __init__(self, name: str) -> None:
        self.name = name
        self._sums: dict[str, list[np.ndarray]] = {}

    def update(self, outputs: Feed, targets: Feed) -> None:
        """Take the outputs of the artifact and those of its parent on the same images, by name, (N, ...) each."""
        for name, expected in targets.items():
            if expected.dtype.kind != "f":
                continue
            b = expected.reshape(len(expected), -1).astype(np.float64)
            a = outputs[name].reshape(len(expected), -1).astype(np.float64)
            rows = np.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1), np.square(a - b).sum(1)], axis=1)
            self._sums.setdefault(name, []).append(rows)

    @property
    def images(self) -> int:
        return min((sum(map(len, parts)) for parts in self._sums.values()), default=0)

    def compute(self) -> float:
        return min((float(self._score(rows, np.ones((1, len(rows))))[0]) for rows in self._rows().values()), default=np.nan)

    def resampled(self) -> np.ndarray | None:
        found = [bootstrap(len(rows), partial(self._score, rows)) for rows in self._rows().values()]
        return np.min(found, axis=0) if found else None

    def _rows(self) -> Mapping[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self._sums.items()}

    def _score(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(B,) scores for weights (B, images) of rows (images, 4)."""
        product, own, signal, noise = rows.T
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.name == "sqnr":
                return np.asarray(10 * np.log10((weights @ signal) / (weights @ noise)))
            cosine = np.where(noise == 0, 1.0, product / np.sqrt(own * signal))
        return np.asarray(weights @ cosine / weights.sum(axis=1))


class Sqnr(Fidelity):
    unit = "dB"

    def __init__(self) -> None:
        super().__init__("sqnr")


class Cosine(Fidelity):
    def __init__(self) -> None:
        super().__init__("cosine")
