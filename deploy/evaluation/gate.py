"""The accuracy gates: what a lower precision may cost, and what an export must reach."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Accuracy, Manifest, Score
from deploy.artifact.summary import drop_text, number_text, range_text, score_text
from deploy.artifact.tuning import Verdict
from deploy.errors import AccuracyError, BackendError, UsageError
from deploy.evaluation.annotated import labelled
from deploy.evaluation.evaluate import Evaluation, measure
from deploy.evaluation.intervals import wilson
from deploy.evaluation.labelled import Remembered, files_request
from deploy.evaluation.options import MetricOptions
from deploy.evaluation.scoring import FIDELITY, check_scoring, scoring
from deploy.evidence.parity import TOLERANCES, Tolerance
from deploy.progress import Progress
from deploy.runtime.catalog import AUTO, CPU_FORMS, onnx_file
from deploy.words import count_of

logger = logging.getLogger(__name__)

NEVER = -1
"""In place of a number of images: no number would decide."""

_DEFAULT_DROP = 1.0


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The data and the limit of an accuracy gate.

    folder: what to evaluate on, as `evaluate` takes it. metric: what is measured.
    max_drop: how much of it may be lost, in its own unit; None: one point of a metric in per cent. `sqnr` and `cosine` have the
        limits of `tolerance` instead.
    backend: where it is judged; None: on every backend of the CPU that is installed, and the worst counts.
    certify: a loss that may be beyond the limit, by its 95 % interval, fails too.
    """

    folder: Path
    max_drop: float | None = None
    backend: str | None = None
    metric: MetricOptions = field(default_factory=MetricOptions)
    certify: bool = False
    tolerance: Tolerance = TOLERANCES["int8"]

    def __post_init__(self) -> None:
        name = self.metric.metric
        if name in FIDELITY:
            if self.max_drop is not None:
                raise UsageError(
                    f"{name} is measured against the FP32 artifact, and nothing of it is lost: the limit is `min_{name}`"
                )
        elif self.metric.own is not None:
            if self.max_drop is None:
                raise UsageError(f"say how much of {name} may be lost, in its own unit: `max_drop`")
            if not self.max_drop >= 0:
                raise UsageError(f"`max_drop` must be 0 or more, not {self.max_drop:g}")
        elif not 0 <= self.limit <= 100:
            raise UsageError(f"`max_drop` must be 0 to 100 points, not {self.max_drop:g}")

    @property
    def limit(self) -> float:
        """The most that may be lost, or of `sqnr` and `cosine` the least that must be reached."""
        least = {"sqnr": self.tolerance.min_sqnr, "cosine": self.tolerance.min_cosine}
        if self.metric.metric in least:
            return least[self.metric.metric] or 0.0
        return _DEFAULT_DROP if self.max_drop is None else self.max_drop

    def check(self, artifact: Artifact) -> None:
        """Raise UsageError, DataError or UserCodeError, before any work, where `artifact` cannot be judged on this data."""
        check_scoring(artifact, self.folder, self.metric)

    def request(self, artifact: Artifact) -> dict[str, Any]:
        """All that the verdict on `artifact` depends on: the path, size and modification time of the files, the limit, and where."""
        data = scoring(artifact, self.folder, self.metric).data
        return {
            "images": files_request(data),
            "limit": self.limit,
            "backend": self.backend,
            "certify": self.certify,
            **self.metric.request(),
        }


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The images that an export is evaluated on, and the accuracy that it must reach.

    folder: an ImageFolder. top1: what training reported, in per cent; None: accuracy is recorded, and held to nothing.
    """

    folder: Path
    top1: float | None = None

    def __post_init__(self) -> None:
        if self.top1 is not None and not 1 < self.top1 <= 100:
            raise UsageError(f"`expect_top1` is in per cent, more than 1 and at most 100, such as 84.2, not {self.top1:g}")

    def check(self, artifact: Artifact) -> None:
        """As `Gate.check`."""
        check_scoring(artifact, self.folder, MetricOptions())

    def request(self, artifact: Artifact) -> dict[str, Any]:
        """All that the verdict on `artifact` depends on: as `Gate.request`."""
        return {"images": files_request(labelled(artifact, self.folder)), "expect_top1": self.top1}


def check_expected(artifact: Artifact, expected: Expected, progress: Progress) -> Accuracy:
    """Evaluate an export. Raises AccuracyError where what training reported is above the 95 % interval of its top-1."""
    found = measure(artifact, scoring(artifact, expected.folder, MetricOptions()), progress=progress)
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


class Reference:
    """The score of the artifact that others are made from, on the data of a gate; measured once."""

    def __init__(self, artifact: Artifact, gate: Gate, progress: Progress) -> None:
        self._artifact = artifact
        self._gate = gate
        self._progress = progress
        self._found: Evaluation | None = None
        found = scoring(artifact, gate.folder, gate.metric)
        self._scoring = replace(found, data=Remembered(found.data))
        if gate.metric.metric not in FIDELITY:
            self._found = measure(artifact, self._scoring, backend=gate.backend or "auto", progress=progress)

    def check(self, after: Artifact, hint: str) -> list[Accuracy]:
        """The score of `after` on the backend of the gate, or on every backend of the CPU that can run it, the worst first.

        Raises AccuracyError, which ends with `hint`, if too much is lost on one, and BackendError if none runs it.
        """
        found = worst_first(self._on_backends(after))
        for each in found:
            if lost := self._too_much(each):
                raise AccuracyError(f"{self._artifact.shown} {lost}. Nothing was written;\n{hint}")
        return found

    def check_cpu_form(self, after: Artifact) -> Accuracy:
        """The score of the CPU form of `after`. Raises AccuracyError if too much is lost, or no backend runs it here."""
        if onnx_file(after, CPU_FORMS) != after.cpu_path:
            raise AccuracyError("its accuracy cannot be judged here: this processor has no VNNI")
        found = self.compared(after, CPU_FORMS)
        if lost := self._too_much(found):
            raise AccuracyError(f"it {lost}")
        return found

    def _too_much(self, found: Accuracy) -> str:
        """What is wrong with a score; "" where it keeps within the limit, by its estimate or with `certify` by its interval."""
        score, gate = found.judged, self._gate
        assert score.limit is not None
        if gate.metric.metric in FIDELITY:
            if not score.value < score.limit and not (gate.certify and found.undecided):
                return ""
            return (
                f"has {score_text(score)} on {gate.folder} on {found.backend}; at least {score.limit:g} is asked for"
                f" (`min_{score.metric}`){_certified(found)}"
            )
        assert score.loss is not None
        assert score.parent is not None
        if score.loss <= score.limit and not (gate.certify and found.undecided):
            return ""
        unit = f" {score.unit}" if score.unit else ""
        interval = "" if score.loss_low is None else f", 95 % interval {range_text(score.loss_low, score.loss_high, score.unit)}"
        return (
            f"loses {drop_text(score).removesuffix(' lost')} of {_called(score.metric)} on {gate.folder} ({number_text(score.parent, score.unit)}{unit} to"
            f" {number_text(score.value, score.unit)}{unit} on {found.backend}{interval}); at most {score.limit:g} are allowed"
            f"{_certified(found) if score.loss <= score.limit else ''}"
        )

    def _on_backends(self, after: Artifact) -> list[Accuracy]:
        if self._gate.backend is not None:
            return [self.compared(after, self._gate.backend)]
        found, reasons = [], []
        for name in AUTO:
            try:
                found.append(self.compared(after, name))
            except BackendError as error:  # not installed, or it does not run this file
                reasons.append(f"{name}: {error}")
        if not found:
            raise BackendError(f"no backend can run {after.manifest.name} here: {'; '.join(reasons)}")
        return found

    def compared(self, after: Artifact, backend: str) -> Accuracy:
        """The score of `after` on a backend, and what it loses; see `verdict_of`. Raises BackendError."""
        gate = self._gate
        same = _taken(after.manifest) == _taken(self._artifact.manifest)
        judged = self._scoring if same else scoring(after, gate.folder, gate.metric)
        against = self._artifact if self._found is None else None
        second = measure(after, judged, against=against, backend=backend, progress=self._progress)
        file = second.file if after.cpu_path is not None else None
        if self._found is None:
            short = second.low is not None and second.low < gate.limit <= second.value
            undecided = second.measured.images_to_reach(gate.limit) if short else None
            score = _score(second, gate.limit)
            return Accuracy(images=second.images, backend=second.backend, file=file, score=score, undecided=undecided)
        return self._verdict(self._found, second, file)

    def _verdict(self, first: Evaluation, second: Evaluation, file: str | None) -> Accuracy:
        """What was lost, with its interval, and how many more images would decide, where that is not known."""
        limit = self._gate.limit
        loss, interval = second.measured.loss(first.measured), second.measured.loss_interval(first.measured)
        undecided = None
        if loss <= limit and (interval is None or interval.high > limit):
            more = second.measured.images_to_decide(first.measured, limit) if interval is not None else None
            undecided = NEVER if more is None else more
        low, high = (interval.low, interval.high) if interval is not None else (None, None)
        top = {"parent_top1": first.top1, "parent_top5": first.top5}
        if second.metric == "top1":
            return _accuracy(
                second,
                file=file,
                **top,
                top1_drop=loss,
                top1_drop_low=low,
                top1_drop_high=high,
                max_drop=limit,
                undecided=undecided,
            )
        score = _score(second, limit, parent=first.value, loss=loss, loss_low=low, loss_high=high)
        if second.top1 is not None:
            return _accuracy(second, file=file, **top, score=score, undecided=undecided)
        return Accuracy(images=second.images, backend=second.backend, file=file, score=score, undecided=undecided)


def _taken(manifest: Manifest) -> tuple[Any, ...]:
    """All that the batches of data depend on, and how the metric reads outputs."""
    return (
        manifest.inputs,
        manifest.outputs,
        manifest.image,
        manifest.preprocess,
        manifest.other_images,
        manifest.classes,
        manifest.decode,
    )


def verdict_of(found: Accuracy) -> Verdict:
    """Whether a score is within the limit that it was held to: by its 95 % interval (inside), by its estimate alone, or not at all."""
    score = found.judged
    assert score.limit is not None
    beyond = score.value < score.limit if score.loss is None else score.loss > score.limit
    if beyond:
        return "outside"
    return "inside" if found.undecided is None else "undecided"


def _certified(found: Accuracy) -> str:
    if not found.undecided:
        return ""
    needed = "no number of images" if found.undecided == NEVER else count_of(found.undecided, "more image")
    return f", which these images do not show: {needed} would decide (`certify`)"


def _called(metric: str) -> str:
    return "top-1 accuracy" if metric == "top1" else "top-5 accuracy" if metric == "top5" else metric


def _score(found: Evaluation, limit: float, **others: Any) -> Score:
    return Score(
        metric=found.metric,
        value=found.value,
        unit=found.unit,
        lower=found.measured.lower,
        low=found.low,
        high=found.high,
        limit=limit,
        **others,
    )


def _accuracy(found: Evaluation, **others: Any) -> Accuracy:
    """The record of a classifier."""
    low, high = wilson(int((found.ranks == 0).sum()), len(found.ranks))
    return Accuracy(
        images=len(found.ranks), top1=found.top1, top5=found.top5, top1_low=low, top1_high=high, backend=found.backend, **others
    )


def worst_first(accuracies: Iterable[Accuracy]) -> list[Accuracy]:
    """Those that lost most first; of `sqnr` and `cosine`, those that reach least."""
    return sorted(accuracies, key=lambda each: each.judged.value if each.judged.loss is None else -each.judged.loss)
