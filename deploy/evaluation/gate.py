"""The accuracy gate: measures the accuracy that a lower precision costs, and refuses too much of it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Accuracy
from deploy.data.image_folder import read_folder
from deploy.errors import AccuracyError, UsageError
from deploy.evaluation.evaluate import check_evaluation, evaluate
from deploy.progress import Progress

_Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The images and the limit of an accuracy gate.

    folder: an ImageFolder to evaluate on. max_drop: how many points of top-1 accuracy may be lost on it.
    """

    folder: Path
    max_drop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"`max_drop` must be 0 to 100 points, not {self.max_drop:g}")

    def check(self, artifact: Artifact) -> None:
        """Raise UsageError or DataError, before any work, where `artifact` cannot be judged by top-1 on these images."""
        check_evaluation(artifact, self.folder)

    def request(self) -> dict[str, Any]:
        """All that the verdict depends on: the path, size and modification time of the images, and the limit."""
        images = read_folder(self.folder)
        stats = [(path, path.stat()) for path, _ in images.samples]
        files = [[str(path.relative_to(self.folder)), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        return {"images": files, "max_drop": self.max_drop}


def check_accuracy(before: Artifact, after: Artifact, gate: Gate, hint: str, progress: Progress) -> Accuracy:
    """Evaluate both artifacts on the same images. Raises AccuracyError, which ends with `hint`, if too much is lost."""
    first = evaluate(before, gate.folder, progress=progress)
    second = evaluate(after, gate.folder, progress=progress)
    drop, low, high = paired_drop(first.ranks == 0, second.ranks == 0)
    accuracy = Accuracy(
        images=len(first.ranks),
        top1=second.top1,
        top5=second.top5,
        parent_top1=first.top1,
        parent_top5=first.top5,
        top1_drop=drop,
        top1_drop_low=low,
        top1_drop_high=high,
        backend=second.backend,
    )
    if drop > gate.max_drop:
        raise AccuracyError(
            f"{before.shown} loses {drop:.2f} points of top-1 accuracy on {gate.folder} ({first.top1:.2f} % to {second.top1:.2f} %,"
            f" 95 % interval {low:.2f} to {high:.2f}); at most {gate.max_drop:g} are allowed. Nothing was written;\n{hint}"
        )
    return accuracy


def paired_drop(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """The points of accuracy lost, and the ends of the 95 % interval; before, after: (images,) bool, whether each is right.

    The interval is that of Bonett and Price 2012 (Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data, J. Educ. Behav. Stat. 37(4)): it holds for few images, and without disagreement.
    """
    count = len(before)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    p, q = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    margin = _Z95 * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
    return 100 * (lost - won) / count, 100 * max(p - q - margin, -1.0), 100 * min(p - q + margin, 1.0)
