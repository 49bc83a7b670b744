"""The accuracy gates: what a lower precision may cost, and what an export must reach."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Accuracy
from deploy.errors import AccuracyError, BackendError, UsageError
from deploy.evaluation.evaluate import Evaluation, check_evaluation, evaluate
from deploy.evaluation.labelled import files_request
from deploy.progress import Progress
from deploy.runtime.catalog import AUTO, CPU_FORMS, onnx_file
from deploy.words import count_of

logger = logging.getLogger(__name__)

_Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The images and the limit of an accuracy gate.

    folder: an ImageFolder to evaluate on. max_drop: how many points of top-1 accuracy may be lost on it.
    backend: where it is judged; None: on every backend of the CPU that is installed, and the worst counts.
    """

    folder: Path
    max_drop: float = 1.0
    backend: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"`max_drop` must be 0 to 100 points, not {self.max_drop:g}")

    def check(self, artifact: Artifact) -> None:
        """Raise UsageError or DataError, before any work, where `artifact` cannot be judged by top-1 on these images."""
        check_evaluation(artifact, self.folder)

    def request(self, artifact: Artifact) -> dict[str, Any]:
        """All that the verdict on `artifact` depends on: the path, size and modification time of the files, the limit, and where."""
        return {"images": files_request(artifact, self.folder), "max_drop": self.max_drop, "backend": self.backend}


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


class Reference:
    """The accuracy of the artifact that others are made from, on the images of a gate; measured once."""

    def __init__(self, artifact: Artifact, gate: Gate, progress: Progress) -> None:
        self._artifact = artifact
        self._gate = gate
        self._progress = progress
        self._found = evaluate(artifact, gate.folder, backend=gate.backend or "auto", progress=progress)

    def check(self, after: Artifact, hint: str) -> list[Accuracy]:
        """The accuracy of `after` on the backend of the gate, or on every backend of the CPU that can run it, the worst first.

        Raises AccuracyError, which ends with `hint`, if too much is lost on one, and BackendError if none runs it.
        """
        found = worst_first(self._on_backends(after))
        if lost := self._too_much(found[0]):
            raise AccuracyError(f"{self._artifact.shown} {lost}. Nothing was written;\n{hint}")
        return found

    def check_cpu_form(self, after: Artifact) -> Accuracy:
        """The accuracy of the CPU form of `after`. Raises AccuracyError if too much is lost, or no backend runs it here."""
        if onnx_file(after, CPU_FORMS) != after.cpu_path:
            raise AccuracyError("its accuracy cannot be judged here: this processor has no VNNI")
        found = self._compared(after, CPU_FORMS)
        if lost := self._too_much(found):
            raise AccuracyError(f"it {lost}")
        return found

    def _too_much(self, found: Accuracy) -> str:
        assert found.top1_drop is not None
        if found.top1_drop <= self._gate.max_drop:
            return ""
        return (
            f"loses {found.top1_drop:.2f} points of top-1 accuracy on {self._gate.folder} ({found.parent_top1:.2f} % to"
            f" {found.top1:.2f} % on {found.backend}, 95 % interval {found.top1_drop_low:.2f} to {found.top1_drop_high:.2f}); at"
            f" most {self._gate.max_drop:g} are allowed"
        )

    def _on_backends(self, after: Artifact) -> list[Accuracy]:
        if self._gate.backend is not None:
            return [self._compared(after, self._gate.backend)]
        found, reasons = [], []
        for name in AUTO:
            try:
                found.append(self._compared(after, name))
            except BackendError as error:  # not installed, or it does not run this file
                reasons.append(f"{name}: {error}")
        if not found:
            raise BackendError(f"no backend can run {after.manifest.name} here: {'; '.join(reasons)}")
        return found

    def _compared(self, after: Artifact, backend: str) -> Accuracy:
        first, second = self._found, evaluate(after, self._gate.folder, backend=backend, progress=self._progress)
        drop, low, high = paired_drop(first.ranks == 0, second.ranks == 0)
        return _accuracy(
            second,
            file=second.file if after.cpu_path is not None else None,
            parent_top1=first.top1,
            parent_top5=first.top5,
            top1_drop=drop,
            top1_drop_low=low,
            top1_drop_high=high,
        )


def worst_first(accuracies: Iterable[Accuracy]) -> list[Accuracy]:
    return sorted(accuracies, key=lambda each: -(each.top1_drop or 0.0))


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
