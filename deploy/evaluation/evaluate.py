"""Accuracy of a classifier on labelled images, and what it says of single ones."""

import difflib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.tensors import Feed, TensorSpec
from deploy.calibration.imagefolder import ImageFolder
from deploy.data.images import ImageInput, read_folder
from deploy.errors import DataError, UsageError
from deploy.evaluation.classifier import check_names, classifier
from deploy.progress import Progress, silent
from deploy.runtime.catalog import BACKENDS
from deploy.runtime.load import load
from deploy.runtime.session import Session

SCHEMA = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy on a folder of images, and speed.

    top1, top5: per cent of the images whose class is the first, or among the first `k`, by logit; of equal logits the
        lower index goes first. A NaN is never right.
    k: 5, or the number of classes where there are fewer: `top5` is then 100 by definition.
    images_per_s: of the whole pipeline, from the files (reading, decoding, preprocessing) to the logits, after one
        batch to warm up. What the model alone does is measured by bench.
    ranks: (images,) how many classes came before the right one, by image in the order of the folder.
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
    """Accuracy of a classifier on an ImageFolder, preprocessed as its manifest says.

    A folder's name is looked up among the class names of the manifest, so that it may hold some of the classes only;
    without names there, the folders in sorted order are the classes, and must be as many. A model with a fixed batch
    is fed batches of that size, whatever `batch_size` says; `progress` tells so.

    Raises UsageError when the model is no image classifier or has no preprocessing, DataError for a folder or an image
    that cannot be used, and as `deploy.load` does.
    """
    artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    source, logits = classifier(artifact)
    images = read_folder(folder)
    labels = _labels(artifact, images, logits)
    size, reason = source.batch_size(batch_size)
    what = f"evaluating {artifact.manifest.name}" + (f" ({reason})" if reason else "")
    samples = [(path, labels[index]) for path, index in images.samples]
    found: list[np.ndarray] = []
    done = 0
    with load(artifact, backend, device, threads=threads) as session:
        _warn_of_zeros(session)
        for feed, _ in _batches(source, samples[:size], size):
            session.run(feed)
        start = time.perf_counter()
        progress(what, 0, len(samples))
        for feed, expected in _batches(source, samples, size):
            scores = session.run(feed)[logits.name][: len(expected)]
            check_names(artifact, scores.shape[1])
            _check_folders(artifact, images, scores.shape[1])
            found.append(ranks(scores, expected))
            top = min(5, scores.shape[1])
            done += len(expected)
            progress(what, done, len(samples))
        seconds = time.perf_counter() - start
        rank = np.concatenate(found)
        return Evaluation(
            top1=100 * float((rank == 0).mean()),
            top5=100 * float((rank < top).mean()),
            k=top,
            images=done,
            images_per_s=done / seconds,
            backend=session.backend,
            ranks=rank,
        )


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one: (N,) for logits (N, classes) and labels (N,). A NaN counts against."""
    right = logits[np.arange(len(labels)), labels][:, None]
    before = ~(logits <= right)  # what is greater, and everything when a NaN is involved
    before |= (logits == right) & (np.arange(logits.shape[1]) < labels[:, None])
    return np.asarray(before.sum(axis=1))


def _batches(source: ImageInput, samples: Sequence[tuple[Path, int]], size: int) -> Iterator[tuple[Feed, np.ndarray]]:
    """As `ImageInput.batches`. Raises UsageError too, when a batch does not fit into memory."""
    try:
        yield from source.batches(samples, size)
    except MemoryError as error:
        raise UsageError(f"a batch size of {size} takes more memory than there is: {error}") from error


def _warn_of_zeros(session: Session) -> None:
    if not BACKENDS[session.backend].computes:
        logger.warning(
            "%s computes nothing: all logits are 0, so that classes mean nothing, and only the speed does", session.backend
        )


def _labels(artifact: Artifact, images: ImageFolder, logits: TensorSpec) -> list[int]:
    """The index among the logits of each folder. Raises DataError for a folder that is no class of the model."""
    names = artifact.manifest.classes
    if names is None:
        count = logits.shape[1]
        if isinstance(count, int):
            _check_folders(artifact, images, count)
        return list(range(len(images.classes)))
    unknown = [folder for folder in images.classes if folder not in names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=3) or names[:3]
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise DataError(
            f"{images.root / unknown[0]}{more} is no class of {artifact.location}, which has {len(names)} of them:"
            f" {', '.join(map(repr, near))}..."
        )
    twice = [folder for folder in images.classes if names.count(folder) > 1]
    if twice:
        raise DataError(
            f"{images.root / twice[0]} may be any of {names.count(twice[0])} classes that {artifact.location} calls so"
        )
    return [names.index(folder) for folder in images.classes]


def _check_folders(artifact: Artifact, images: ImageFolder, count: int) -> None:
    """Raise DataError when the model's classes have no names and are not as many as the folders."""
    if artifact.manifest.classes is None and len(images.classes) != count:
        raise DataError(
            f"{images.root} has {len(images.classes)} class folders and {artifact.location} {count} classes, without names to"
            " pair them by; export it with --classes FILE"
        )
