"""Labelled data as batches: images of an ImageFolder, with the table beside them, or `.npz` files."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed, row_count
from deploy.data.calibration_set import fit_feed
from deploy.data.image_folder import image_batches, read_folder, table_files
from deploy.data.npz_folder import LABEL, holds_npz, read_npz, read_npz_folder
from deploy.data.records import record_input
from deploy.errors import BackendError, DataError, InputError
from deploy.runtime.session import Session
from deploy.words import as_utf8

Skip = Callable[[Path, Exception], None]
"""What is done with a file that cannot be used, and the error; it raises where that is not to be left out."""


class Batch(NamedTuple):
    """A feed, the indices of the classes of its first rows (the others fill it up), and the files they come from."""

    feed: Feed
    labels: np.ndarray
    files: tuple[Path, ...]


class Labelled(ABC):
    """Labelled data for a model.

    classes: the names of the class folders in the order of the indices; None where the files say the indices themselves.
    files: all that hold the data, in order.
    """

    root: Path
    classes: tuple[str, ...] | None
    files: tuple[Path, ...]

    @abstractmethod
    def batches(self, classes: Sequence[int], batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        """The data in order; `classes` has the index among the model's classes for each class folder.

        Raises DataError and UsageError for a file that cannot be used, unless `skip` takes the error.
        """

    def batch_size(self, wanted: int) -> tuple[int, str]:
        """The batch size to use in place of `wanted`, and the reason if it is another, else ""."""
        return wanted, ""


class _Images(Labelled):
    def __init__(self, artifact: Artifact, folder: Path) -> None:
        images = read_folder(folder)
        self.root, self.classes = folder, images.classes
        self.files = tuple(path for path, _ in images.samples)
        self._folders = [label for _, label in images.samples]
        self._source = record_input(artifact, [folder])

    def batch_size(self, wanted: int) -> tuple[int, str]:
        return self._source.batch_size(wanted)

    def batches(self, classes: Sequence[int], batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        for error in self._source.missing(self.files):
            if skip is None:
                raise error
            skip(self.root, error)
        samples = [(path, index) for index, path in enumerate(self.files)]
        for feed, indices in image_batches(self._source, samples, batch_size, skip=skip):
            labels = np.array([classes[self._folders[index]] for index in indices])
            yield Batch(feed, labels, tuple(self.files[index] for index in indices))


class _Npz(Labelled):
    def __init__(self, artifact: Artifact, folder: Path) -> None:
        found = read_npz_folder(folder)
        self.root, self.classes = folder, found.classes
        self.files = tuple(path for path, _ in found.samples)
        self._samples = found.samples
        self._specs = artifact.manifest.inputs
        if self.classes is None and not any(map(self._may_have_labels, self.files[:1])):
            raise DataError(
                f"{folder} holds .npz files without labels: {self.files[0].name} has no array {LABEL!r} with the index of each row's"
                " class, and is in no class folder"
            )

    def _may_have_labels(self, path: Path) -> bool:
        try:
            return read_npz(path, self._specs)[1] is not None
        except DataError:
            return True  # damaged: it is told of when its turn comes

    def batches(self, classes: Sequence[int], batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        for path, folder in self._samples:
            try:
                batches = list(self._read(path, None if self.classes is None else classes[folder], batch_size))
            except DataError as error:
                if skip is None:
                    raise
                skip(path, error)
            else:
                yield from batches

    def _read(self, path: Path, label: int | None, batch_size: int) -> Iterator[Batch]:
        arrays, labels = read_npz(path, self._specs)
        feeds = list(fit_feed(arrays, self._specs, batch_size, str(path)))
        rows = [row_count(feed) for feed in feeds]
        if label is not None:
            labels = np.full(sum(rows), label)
        elif labels is None:
            raise DataError(f"{path} has no array {LABEL!r} with the index of each row's class")
        if labels.dtype.kind not in "iu" or labels.shape != (sum(rows),):
            raise DataError(f"{path}: {LABEL!r} is {labels.dtype} {labels.shape}; expected {sum(rows)} indices of classes")
        for feed, part in zip(feeds, np.split(labels, np.cumsum(rows)[:-1]), strict=True):
            yield Batch(feed, part, (path,) * len(part))


def labelled(artifact: Artifact, folder: Path) -> Labelled:
    """The labelled data of `folder` for `artifact`. Raises DataError for a folder that cannot be used, and UsageError."""
    return (_Npz if holds_npz(folder) else _Images)(artifact, folder)


def files_request(artifact: Artifact, folder: Path) -> list[list[Any]]:
    """The path, size and modification time of all files that an evaluation on `folder` depends on. Raises DataError."""
    files = [path for path, _ in (read_npz_folder(folder) if holds_npz(folder) else read_folder(folder)).samples]
    if len(artifact.manifest.inputs) > 1:
        files += table_files(folder, files)
    stats = [(path, path.stat()) for path in files]
    return [[as_utf8(os.path.relpath(path, folder)), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def run_batch(session: Session, batch: Batch, skip: Skip | None) -> Feed | None:
    """The results of a batch; None where it is one file that the model does not run with and `skip` takes the error."""
    try:
        return dict(session.run(batch.feed))
    except (InputError, BackendError) as error:
        if skip is None or len(set(batch.files)) != 1:
            raise
        skip(batch.files[0], DataError(f"{batch.files[0]}: {error}"))
        return None


def out_of_order(names: Sequence[str]) -> list[str]:
    """Class folders called by numbers, in the order of the numbers where `names` are in another one; else none.

    `names` are numbers, or a number with the same text around it in all: `0`, `1`, `10`, `2` or `class1`, `class10`, `class2`.
    """
    parts = [re.fullmatch(r"(\D*)(\d+)(\D*)", name, re.ASCII) for name in names]
    found = [part for part in parts if part is not None]
    if len(found) < len(names) or len({(part[1], part[3]) for part in found}) != 1:
        return []
    ordered = [part[0] for part in sorted(found, key=lambda part: int(part[2]))]
    return ordered if ordered != list(names) else []
