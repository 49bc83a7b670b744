"""Measures the accuracy of a classifier on labelled images."""

import functools
import logging
import time
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.tensors import TensorSpec
from deploy.errors import DataError
from deploy.evaluation.classifier import check_names, class_scores, warn_if_null
from deploy.evaluation.labelled import Batch, Labelled, Skip, labelled, out_of_order, run_batch
from deploy.progress import Progress, silent
from deploy.runtime.load import load
from deploy.words import count_of, did_you_mean, printable

logger = logging.getLogger(__name__)

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The accuracy on a folder of images, and the speed.

    top1, top5: the percentage of images whose class has the largest logit, or one of the `k` largest. Of equal logits the
        lower index comes first; a NaN is never right.
    k: 5, or the number of classes if there are fewer, which makes `top5` 100 by definition.
    images_per_s: of the whole pipeline from the files (reading, decoding, preprocessing) to the logits, after one batch of
        warm-up. `deploy bench` measures the model alone.
    file: the name of the file that was run.
    ranks: (images,) the number of classes before the right one for every image, in the order of the folder.
    """

    top1: float
    top5: float
    k: int
    images: int
    images_per_s: float
    backend: str
    file: str
    ranks: np.ndarray = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The document of `deploy eval --json`."""
        return {"schema": SCHEMA, **{name: value for name, value in asdict(self).items() if name != "ranks"}}


def evaluate(
    artifact: Artifact | Path | str,
    folder: Path | str,
    *,
    backend: str = "auto",
    batch_size: int = 32,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
    skip: Skip | None = None,
) -> Evaluation:
    """Measure the accuracy of a classifier on an ImageFolder, with the preprocessing in its manifest.

    Class folders are matched with the class names in the manifest, so the ImageFolder may have only some of the classes.
    If the manifest has no names, the sorted folders are the classes, and there must be as many. For a model with a fixed
    batch, `batch_size` is ignored, and `progress` reports it. A model that takes more than an image finds the rest in the
    table of the folder (`deploy.data.table`). A folder of `.npz` files (`deploy.data.npz_folder`) needs no preprocessing.

    skip: called with a file that cannot be used and the error, which leaves the file out; without it the error is raised.

    Raises UsageError if the model is no image classifier or has no preprocessing, DataError for a folder or a file that
    cannot be used, and the errors of `deploy.load`.
    """
    artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    class_scores(artifact)
    data = labelled(artifact, Path(folder))
    if artifact.manifest.classes is None and data.classes is not None:
        _warn_of_order(data.root, data.classes)
    return _measure(
        artifact, data, backend=backend, batch_size=batch_size, device=device, threads=threads, progress=progress, skip=skip
    )


def _measure(
    artifact: Artifact,
    data: Labelled,
    *,
    backend: str = "auto",
    batch_size: int = 32,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
    skip: Skip | None = None,
) -> Evaluation:
    """`evaluate` on data that was read."""
    logits = class_scores(artifact)
    classes = _classes(artifact, data, logits)
    size, reason = data.batch_size(batch_size)
    what = f"evaluating {artifact.manifest.name}" + (f" ({reason})" if reason else "")
    rank_batches: list[np.ndarray] = []
    done = 0
    with load(artifact, backend, device, threads=threads) as session:
        warn_if_null(session.backend)
        for batch in islice(data.batches(classes, size, skip and _quiet), 1):
            run_batch(session, batch, skip and _quiet)
        start = time.perf_counter()
        progress(what, 0, len(data.files))
        for batch in data.batches(classes, size, skip):
            results = run_batch(session, batch, skip)
            if results is None:
                continue
            scores = results[logits.name][: len(batch.labels)]
            check_names(artifact, scores.shape[1])
            _check_folders(artifact, data, scores.shape[1])
            rank_batches.append(ranks(scores, _checked(batch, scores.shape[1])))
            top = min(5, scores.shape[1])
            done += len(batch.labels)
            progress(what, done, max(done, len(data.files)))
        seconds = time.perf_counter() - start
        if not rank_batches:
            raise DataError(f"none of {count_of(len(data.files), 'file')} in {data.root} can be used")
        rank = np.concatenate(rank_batches)
        return Evaluation(
            top1=100 * float((rank == 0).mean()),
            top5=100 * float((rank < top).mean()),
            k=top,
            images=done,
            images_per_s=done / seconds,
            backend=session.backend,
            file=session.onnx_file.name if artifact.manifest.kind == "onnx" else artifact.payload.name,
            ranks=rank,
        )


def check_evaluation(artifact: Artifact, folder: Path | str) -> None:
    """Raise what `evaluate` raises before it runs anything: UsageError for no image classifier, DataError for the folder."""
    logits = class_scores(artifact)
    _classes(artifact, labelled(artifact, Path(folder)), logits)


def _quiet(path: Path, error: Exception) -> None:
    """Leave a file out of the warm-up: it is told of when it is measured."""


def _checked(batch: Batch, classes: int) -> np.ndarray:
    """The labels of a batch. Raises DataError for one that is no class: those of folders were checked before."""
    wrong = (batch.labels < 0) | (batch.labels >= classes)
    if wrong.any():
        raise DataError(
            f"{printable(batch.files[int(wrong.argmax())])} has the label {batch.labels[wrong][0]}, and there are {classes} classes"
        )
    return batch.labels


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The number of classes before the right one, (N,), for logits (N, classes) and labels (N,). A NaN is never right."""
    right = logits[np.arange(len(labels)), labels][:, None]
    before = ~(logits <= right)  # greater ones, and all comparisons with a NaN
    before |= (logits == right) & (np.arange(logits.shape[1]) < labels[:, None])
    return np.asarray(before.sum(axis=1))


def _classes(artifact: Artifact, data: Labelled, logits: TensorSpec) -> list[int]:
    """The index of every class folder among the logits. Raises DataError for a folder that is no class of the model."""
    names = artifact.manifest.classes
    if data.classes is None:
        return []
    if names is None:
        count = logits.shape[1]
        if isinstance(count, int):
            _check_folders(artifact, data, count)
        return list(range(len(data.classes)))
    unknown = [folder for folder in data.classes if folder not in names]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise DataError(
            f"{data.root / unknown[0]}{more} is no class of {artifact.location}, which has {len(names)} of them:"
            f" {', '.join(map(repr, names[:3]))}...{did_you_mean(unknown[0], names)}"
        )
    twice = [folder for folder in data.classes if names.count(folder) > 1]
    if twice:
        raise DataError(f"{data.root / twice[0]} may be any of {names.count(twice[0])} classes that {artifact.location} calls so")
    return [names.index(folder) for folder in data.classes]


@functools.cache
def _warn_of_order(root: Path, classes: tuple[str, ...]) -> None:
    """Say where class folders are called by numbers and their order is another; once, for a gate evaluates twice.

    Nothing but their order makes them classes where the model has no names.
    """
    if ordered := out_of_order(classes):
        index = next(index for index, name in enumerate(classes) if name != ordered[index])
        logger.warning(
            "the class folders of %s are called by numbers, and taken in the order of torchvision's ImageFolder: class %d is %r, not %r;"
            " if the model's classes are the numbers, export it with --classes FILE, which lists them in their order",
            root,
            index,
            classes[index],
            ordered[index],
        )


def _check_folders(artifact: Artifact, data: Labelled, count: int) -> None:
    """Raise DataError if the model has no class names and the number of folders is not that of its classes."""
    if artifact.manifest.classes is None and data.classes is not None and len(data.classes) != count:
        raise DataError(
            f"{data.root} has {count_of(len(data.classes), 'class folder')} and {artifact.location}"
            f" {count_of(count, 'class')}, without names to pair them by; export it with --classes FILE"
        )
