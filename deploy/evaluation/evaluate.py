"""Measures the accuracy of a classifier on labelled images."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.tensors import TensorSpec
from deploy.calibration.imagefolder import ImageFolder
from deploy.data.image_folder import image_batches, read_folder
from deploy.errors import DataError
from deploy.evaluation.classifier import check_names, classifier, warn_if_null
from deploy.progress import Progress, silent
from deploy.runtime.load import load
from deploy.words import count_of, did_you_mean

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The accuracy on a folder of images, and the speed.

    top1, top5: the percentage of images whose class has the largest logit, or one of the `k` largest. Of equal logits the
        lower index comes first; a NaN is never right.
    k: 5, or the number of classes if there are fewer, which makes `top5` 100 by definition.
    images_per_s: of the whole pipeline from the files (reading, decoding, preprocessing) to the logits, after one batch of
        warm-up. `deploy bench` measures the model alone.
    ranks: (images,) the number of classes before the right one for every image, in the order of the folder.
    """

    top1: float
    top5: float
    k: int
    images: int
    images_per_s: float
    backend: str
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
) -> Evaluation:
    """Measure the accuracy of a classifier on an ImageFolder, with the preprocessing in its manifest.

    Class folders are matched with the class names in the manifest, so the ImageFolder may have only some of the classes.
    If the manifest has no names, the sorted folders are the classes, and there must be as many. For a model with a fixed
    batch, `batch_size` is ignored, and `progress` reports it.

    Raises UsageError if the model is no image classifier or has no preprocessing, DataError for a folder or an image that
    cannot be used, and the errors of `deploy.load`.
    """
    artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    source, logits = classifier(artifact)
    images = read_folder(folder)
    labels = _labels(artifact, images, logits)
    size, reason = source.batch_size(batch_size)
    what = f"evaluating {artifact.manifest.name}" + (f" ({reason})" if reason else "")
    samples = [(path, labels[index]) for path, index in images.samples]
    rank_batches: list[np.ndarray] = []
    done = 0
    with load(artifact, backend, device, threads=threads) as session:
        warn_if_null(session.backend)
        for feed, _ in image_batches(source, samples[:size], size):
            session.run(feed)
        start = time.perf_counter()
        progress(what, 0, len(samples))
        for feed, expected in image_batches(source, samples, size):
            scores = session.run(feed)[logits.name][: len(expected)]
            check_names(artifact, scores.shape[1])
            _check_folders(artifact, images, scores.shape[1])
            rank_batches.append(ranks(scores, expected))
            top = min(5, scores.shape[1])
            done += len(expected)
            progress(what, done, len(samples))
        seconds = time.perf_counter() - start
        rank = np.concatenate(rank_batches)
        return Evaluation(
            top1=100 * float((rank == 0).mean()),
            top5=100 * float((rank < top).mean()),
            k=top,
            images=done,
            images_per_s=done / seconds,
            backend=session.backend,
            ranks=rank,
        )


def check_evaluation(artifact: Artifact, folder: Path | str) -> None:
    """Raise what `evaluate` raises before it runs anything: UsageError for no image classifier, DataError for the folder."""
    _, logits = classifier(artifact)
    _labels(artifact, read_folder(folder), logits)


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The number of classes before the right one, (N,), for logits (N, classes) and labels (N,). A NaN is never right."""
    right = logits[np.arange(len(labels)), labels][:, None]
    before = ~(logits <= right)  # greater ones, and all comparisons with a NaN
    before |= (logits == right) & (np.arange(logits.shape[1]) < labels[:, None])
    return np.asarray(before.sum(axis=1))


def _labels(artifact: Artifact, images: ImageFolder, logits: TensorSpec) -> list[int]:
    """The index of every folder among the logits. Raises DataError for a folder that is no class of the model."""
    names = artifact.manifest.classes
    if names is None:
        count = logits.shape[1]
        if isinstance(count, int):
            _check_folders(artifact, images, count)
        return list(range(len(images.classes)))
    unknown = [folder for folder in images.classes if folder not in names]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise DataError(
            f"{images.root / unknown[0]}{more} is no class of {artifact.location}, which has {len(names)} of them:"
            f" {', '.join(map(repr, names[:3]))}...{did_you_mean(unknown[0], names)}"
        )
    twice = [folder for folder in images.classes if names.count(folder) > 1]
    if twice:
        raise DataError(
            f"{images.root / twice[0]} may be any of {names.count(twice[0])} classes that {artifact.location} calls so"
        )
    return [names.index(folder) for folder in images.classes]


def _check_folders(artifact: Artifact, images: ImageFolder, count: int) -> None:
    """Raise DataError if the model has no class names and the number of folders is not that of its classes."""
    if artifact.manifest.classes is None and len(images.classes) != count:
        raise DataError(
            f"{images.root} has {count_of(len(images.classes), 'class folder')} and {artifact.location}"
            f" {count_of(count, 'class')}, without names to pair them by; export it with --classes FILE"
        )
