"""The accuracy gates: what a lower precision may cost, and what an export must reach."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Accuracy
from deploy.errors import AccuracyError, UsageError
from deploy.evaluation.evaluate import Evaluation, check_evaluation, evaluate
from deploy.evaluation.labelled import files_request
from deploy.progress import Progress
from deploy.words import count_of

logger = logging.getLogger(__name__)

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

    def request(self, artifact: Artifact) -> dict[str, Any]:
        """All that the verdict on `artifact` depends on: the path, size and modification time of the files, and the limit."""
        return {"images": files_request(artifact, self.folder), "max_drop": self.max_drop}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The images that an export is evaluated on, and the accuracy that it must reach.

    folder: as in `Gate`. top1: what training reported, in per cent; None: accuracy is recorded, and held to nothing.
    """

    folder: Path
    top1: float | None = None

    def __post_init__(self) -> None:
        if self.top1 is not None and not 1 < self.top1 <= 100:
            raise UsageError(f"`expect_top1` is in per cent, more than 1 and at most 100, such as 84.2, not {self.top1:g}")

    def request(self, artifact: Artifact) -> dict[str, Any]:
        """All that the verdict on `artifact` depends on: as `Gate.request`."""
        return {"images": files_request(artifact, self.folder), "expect_top1": self.top1}


def check_expected(artifact: Artifact, expected: Expected, progress: Progress) -> Accuracy:
    """Evaluate an export. Raises AccuracyError where what training reported is above the 95 % interval of its top-1."""
    found = evaluate(artifact, expected.folder, progress=progress)
    accuracy = _accuracy(found, expected_top1=expected.top1)
    low, high = accuracy.top1_low, accuracy.top1_high
    assert low is not None
    assert high is not None
    if expected.top1 is None:
        return accuracy
    said = (
        f"top-1 {found.top1:.2f} % of {count_of(found.images, 'image')} of {expected.folder} (95 % interval {low:.2f} to {high:.2f}),"
        f" and training reported {expected.top1:g} %"
    )
    if expected.top1 > high:
        raise AccuracyError(
            f"{artifact.manifest.name} has {said}. Nothing was written;\nits preprocessing: {_preprocessing(artifact)}; its classes:"
            f" {'names of its own' if artifact.manifest.classes else 'the class folders in the order of their names'}"
        )
    if expected.top1 < low:
        logger.warning("%s has %s, which is less", artifact.manifest.name, said)
    return accuracy


def _preprocessing(artifact: Artifact) -> str:
    manifest = artifact.manifest
    made = {manifest.image or manifest.inputs[0].name: manifest.preprocess, **manifest.other_images}
    texts = [
        (f"{name}: " if len(made) > 1 else "")
        + ", ".join(f"{key} {value}" for key, value in each.to_json().items() if value is not None)
        for name, each in made.items()
        if each is not None
    ]
    return "; ".join(texts) or "none"


def _accuracy(found: Evaluation, **others: Any) -> Accuracy:
    low, high = wilson(int((found.ranks == 0).sum()), len(found.ranks))
    return Accuracy(
        images=len(found.ranks), top1=found.top1, top5=found.top5, top1_low=low, top1_high=high, backend=found.backend, **others
    )


def check_accuracy(before: Artifact, after: Artifact, gate: Gate, hint: str, progress: Progress) -> Accuracy:
    """Evaluate both artifacts on the same images. Raises AccuracyError, which ends with `hint`, if too much is lost."""
    first = evaluate(before, gate.folder, progress=progress)
    second = evaluate(after, gate.folder, progress=progress)
    drop, low, high = paired_drop(first.ranks == 0, second.ranks == 0)
    accuracy = _accuracy(
        second,
        parent_top1=first.top1,
        parent_top5=first.top5,
        top1_drop=drop,
        top1_drop_low=low,
        top1_drop_high=high,
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


def wilson(right: int, count: int) -> tuple[float, float]:
    """The ends of the 95 % interval of an accuracy in per cent, of `count` images of which `right` are right.

    The score interval of Wilson 1927 (Probable inference, the law of succession, and statistical inference, J. Am. Stat.
    Assoc. 22(158)): it holds for few images, and where all or none are right.
    """
    share, z2 = right / count, _Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    margin = _Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return 100 * (centre - margin) if right else 0.0, 100 * (centre + margin) if right < count else 100.0
