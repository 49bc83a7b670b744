"""Measures a metric of an artifact on data with labels, alone or beside another artifact."""

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.tensors import Feed
from deploy.errors import ArtifactError, DataError, UsageError, UserCodeError
from deploy.evaluation.classifier import warn_if_null
from deploy.evaluation.differences import Differences
from deploy.evaluation.labelled import Batch, Skip, run_batch
from deploy.evaluation.metric import ClassScore, Confusion, Metric
from deploy.evaluation.options import IGNORE, MetricOptions
from deploy.evaluation.profiles import nearest_batch
from deploy.evaluation.scoring import FIDELITY, Scoring, scoring
from deploy.evaluation.topk import TopK
from deploy.progress import Progress, silent
from deploy.runtime.load import load
from deploy.runtime.session import Session
from deploy.words import count_of

logger = logging.getLogger(__name__)

SCHEMA = 1
CONFUSIONS = 10
"""The most frequent confusions that are listed."""


@dataclass(frozen=True, kw_only=True)
class Against:
    """Another artifact on the same data.

    value: its score; None for `sqnr` and `cosine`, which are measured against it. loss: how much worse the first one is, in the
    metric's unit, with the 95 % interval. differing: the inputs that the two answer differently.
    """

    artifact: str
    value: float | None
    loss: float | None
    loss_low: float | None
    loss_high: float | None
    differing: Differences = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("artifact", "value", "loss", "loss_low", "loss_high")}
        inputs = [each.to_json() for each in self.differing]
        return {**numbers, "differing": len(self.differing), "inputs": inputs}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The score of an artifact on some data, and the speed.

    metric, value, unit: the score that was asked for, in `%`, `dB` or a unit of the user's ("").
    low, high: its 95 % interval; None where there is none.
    top1, top5: for `top1` and `top5`, the percentage of images whose class has the largest logit, or one of the `k` largest. Of
        equal logits the lower index comes first; a NaN is never right.
    k: 5, or the number of classes if there are fewer, which makes `top5` 100 by definition.
    images_per_s: of the whole pipeline from the files (reading, decoding, preprocessing) to the outputs, after one batch of
        warm-up. `deploy bench` measures the model alone.
    file: the name of the file that was run.
    classes: the score of each class. confusions: what was taken for what, the ten most frequent.
    measured: the metric itself, with what it keeps of every image, in the order of `files`.
    """

    images: int
    images_per_s: float
    backend: str
    file: str
    metric: str
    value: float
    unit: str
    low: float | None
    high: float | None
    top1: float | None = None
    top5: float | None = None
    k: int | None = None
    classes: tuple[ClassScore, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    against: Against | None = None
    measured: Metric = field(repr=False, compare=False)
    files: tuple[Path, ...] = field(repr=False, compare=False)

    @property
    def ranks(self) -> np.ndarray:
        """(images,) the number of classes before the right one for every image, of a classifier."""
        assert isinstance(self.measured, TopK)
        return self.measured.ranks

    def to_json(self) -> dict[str, Any]:
        """The document of `deploy eval --json`; a score that is infinite, of outputs without any difference, is null."""
        top = {} if self.top1 is None else {"top1": self.top1, "top5": self.top5, "k": self.k}
        score = {"metric": self.metric, "value": _finite(self.value), "unit": self.unit, "low": self.low, "high": self.high}
        return {
            "schema": SCHEMA,
            **top,
            **{name: getattr(self, name) for name in ("images", "images_per_s", "backend", "file")},
            **score,
            "classes": [asdict(each) for each in self.classes],
            "confusions": [asdict(each) for each in self.confusions],
            **({} if self.against is None else {"against": self.against.to_json()}),
        }


def evaluate(
    artifact: Artifact | Path | str,
    folder: Path | str,
    *,
    metric: str = "top1",
    ignore_index: int = IGNORE,
    against: Artifact | Path | str | None = None,
    backend: str = "auto",
    batch_size: int = 32,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
    skip: Skip | None = None,
) -> Evaluation:
    """Measure `metric` of an artifact on the data in `folder`, with the preprocessing in its manifest.

    metric: `top1`, `top5`, `miou`, `map`, `sqnr`, `cosine`, or the user's own: see `evaluation.options.MetricOptions`.
    folder: for classifiers an ImageFolder. Class folders are matched with the class names in the manifest, so that it may have
        only some of the classes; without names the sorted folders are the classes, and there must be as many. For `miou` a
        folder with `images/` and `masks/`, for `map` a COCO JSON, for `sqnr` and `cosine` any images. A folder of `.npz` files
        (`deploy.data.npz_folder`) needs no preprocessing. A model that takes more than an image finds the rest in the table of
        the folder (`deploy.data.table`).
    against: another artifact to run on the same data: see `Against`. `sqnr` and `cosine` compare with it, by default with the
        FP32 artifact that this one was made from.
    batch_size: another for a model with a fixed batch, or whose engine takes no larger ones; `progress` reports it.
    skip: called with a file that cannot be used and the error, which leaves the file out; without it the error is raised.

    Raises UsageError for outputs that the metric cannot read or a model without preprocessing, DataError for a folder or a file
    that cannot be used, UserCodeError for a metric of the user's that fails or gives no number, and the errors of `deploy.load`.
    """
    artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    options = MetricOptions(metric=metric, ignore_index=ignore_index)
    other = against if isinstance(against, Artifact) or against is None else open_artifact(against)
    if other is None and metric in FIDELITY:
        other = _fp32(artifact, metric)
    if other is not None:
        _check_comparable(artifact, other)
    found = scoring(artifact, Path(folder), options)
    found.data.check()
    return measure(
        artifact, found, against=other, backend=backend, batch_size=batch_size, device=device, threads=threads, progress=progress,
        skip=skip,
    )  # fmt: skip


def _check_comparable(artifact: Artifact, other: Artifact) -> None:
    """Raise UsageError unless two artifacts take the same images in the same way, and mean the same classes."""
    one, two = artifact.manifest, other.manifest
    if (one.preprocess, one.other_images) != (two.preprocess, two.other_images):
        raise UsageError(
            f"{artifact.location} and {other.location} preprocess images in different ways, and get the same arrays here"
        )
    if one.classes != two.classes:
        raise UsageError(f"{artifact.location} and {other.location} have different class names: their answers cannot be compared")


def _fp32(artifact: Artifact, metric: str) -> Artifact:
    """The nearest ancestor in FP32. Raises UsageError where there is none."""
    try:
        ancestor = artifact.parent()
        while ancestor is not None and (ancestor.manifest.precision != "fp32" or ancestor.manifest.kind != "onnx"):
            ancestor = ancestor.parent()
    except ArtifactError as error:
        raise UsageError(f"{metric} compares with the FP32 artifact, and {error}; name another with `against`") from error
    if ancestor is None:
        raise UsageError(f"{artifact.location} has no FP32 artifact that it was made from: name what to compare with, `against`")
    return ancestor


def measure(
    artifact: Artifact,
    found: Scoring,
    *,
    against: Artifact | None = None,
    backend: str = "auto",
    batch_size: int = 32,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
    skip: Skip | None = None,
) -> Evaluation:
    """`evaluate` with a metric and data that were read for `artifact`."""
    data = found.data
    size, reason = data.batch_size(batch_size)
    with ExitStack() as stack:
        session = stack.enter_context(load(artifact, backend, device, threads=threads))
        size, reason = nearest_batch(session, size, reason)
        what = f"evaluating {artifact.manifest.name}" + (f" ({reason})" if reason else "")
        warn_if_null(session.backend)
        second = None if against is None else stack.enter_context(_Other.opened(against, found, device, threads))
        _try_out(session, second, found, size, skip)
        metric = found.make()
        files: list[Path] = []
        aside_s, start = 0.0, time.perf_counter()
        progress(what, 0, len(data.files))
        for batch in data.batches(size, skip):
            results = run_batch(session, batch, skip)
            if results is None:
                continue
            if second is not None:
                since = time.perf_counter()
                second.take(found, results, batch)
                aside_s += time.perf_counter() - since
            _update(metric, found, results, batch, second)
            files.extend(batch.files)
            progress(what, len(files), max(len(files), len(data.files)))
        seconds = time.perf_counter() - start - aside_s
        if not files:
            raise DataError(f"none of {count_of(len(data.files), 'file')} in {data.root} can be used")
        file = session.onnx_file.name if artifact.manifest.kind == "onnx" else artifact.payload.name
        done = _evaluation(metric, tuple(files), len(files) / seconds, session.backend, file)
        return done if second is None else second.compared(done)


class _Other:
    """The artifact that another is compared with, on the same batches."""

    def __init__(self, artifact: Artifact, session: Session, own: Scoring | None, names: list[str] | None) -> None:
        self._artifact = artifact
        self._session = session
        self._own = own
        self._metric = own.make() if own is not None else None
        self.results: Feed = {}
        self._differing = Differences(names)

    @classmethod
    def opened(cls, artifact: Artifact, found: Scoring, device: str, threads: int | None) -> "_Other":
        own = None if found.options.metric in FIDELITY else scoring(artifact, found.data.root, found.options)
        return cls(artifact, load(artifact, "auto", device, threads=threads), own, artifact.manifest.classes)

    def __enter__(self) -> "_Other":
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def run(self, batch: Batch) -> Feed:
        """Its results on a batch, whose arrays may be in another precision."""
        specs = {spec.name: spec for spec in self._session.inputs}
        if set(specs) != set(batch.feed):
            raise UsageError(
                f"{self._artifact.location} takes {', '.join(specs)}, and the other one {', '.join(batch.feed)}: they cannot be compared"
            )
        feed = {name: array.astype(specs[name].dtype, copy=False) for name, array in batch.feed.items()}
        return dict(self._session.run(feed))

    def take(self, found: Scoring, results: Feed, batch: Batch) -> None:
        self.results = self.run(batch)
        if self._own is not None and self._metric is not None:
            others = self._own.read(self.results, batch)
            self._metric.update(others, batch.targets)
            self._differing.add(batch.files, found.read(results, batch), others, batch.targets)
        else:
            _check_alike(self._artifact, results, self.results)
            self._differing.add(batch.files, results, self.results, None)

    def compared(self, done: Evaluation) -> Evaluation:
        interval = done.measured.loss_interval(self._metric) if self._metric is not None else None
        against = Against(
            artifact=self._artifact.shown,
            value=None if self._metric is None else self._metric.compute(),
            loss=None if self._metric is None else done.measured.loss(self._metric),
            loss_low=interval.low if interval else None,
            loss_high=interval.high if interval else None,
            differing=self._differing,
        )
        return Evaluation(**{**vars(done), "against": against})


def _check_alike(artifact: Artifact, results: Feed, others: Feed) -> None:
    for name, expected in others.items():
        if name not in results or results[name].shape != expected.shape:
            shown = "missing" if name not in results else str(results[name].shape)
            raise UsageError(f"{artifact.location} gives {name!r} as {expected.shape}; in the other one it is {shown}")


def _try_out(session: Session, second: _Other | None, found: Scoring, size: int, skip: Skip | None) -> None:
    """Warm up, and try the metric on a batch from all over the data: what is wrong with it is said before the work."""
    for batch in found.data.some(size, skip and _quiet):
        results = run_batch(session, batch, skip and _quiet)
        if results is None:
            return
        if second is not None:
            second.results = second.run(batch)
            if found.options.metric in FIDELITY:
                _check_alike(second._artifact, results, second.results)
        metric = found.make()
        _update(metric, found, results, batch, second)
        if found.options.own is not None:
            try:
                metric.compute()
            except UserCodeError as error:
                raise UserCodeError(f"{error}; it was tried on one batch of {count_of(len(batch.files), 'row')}") from error


def _update(metric: Metric, found: Scoring, results: Feed, batch: Batch, second: _Other | None) -> None:
    if found.options.metric in FIDELITY:
        assert second is not None
        rows = len(batch.files)
        metric.update({name: each[:rows] for name, each in results.items()}, {n: e[:rows] for n, e in second.results.items()})
    else:
        metric.update(found.read(results, batch), batch.targets)


def _evaluation(metric: Metric, files: tuple[Path, ...], images_per_s: float, backend: str, file: str) -> Evaluation:
    value, interval = metric.compute(), metric.interval()
    if math.isnan(value):
        raise DataError(f"{metric.name} cannot be said of this data: there is nothing of any class in it")
    top: dict[str, Any] = {}
    if isinstance(metric, TopK):
        ranks, k = metric.ranks, min(5, metric.classes)
        top = {"top1": 100 * float((ranks == 0).mean()), "top5": 100 * float((ranks < k).mean()), "k": k}
    return Evaluation(
        images=len(files),
        images_per_s=images_per_s,
        backend=backend,
        file=file,
        metric=metric.name,
        value=value,
        unit=metric.unit,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        classes=tuple(metric.by_class()),
        confusions=tuple(metric.confusions()[:CONFUSIONS]),
        measured=metric,
        files=files,
        **top,
    )


def _quiet(path: Path, error: Exception) -> None:
    """Leave a file out of the warm-up: it is told of when it is measured."""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
