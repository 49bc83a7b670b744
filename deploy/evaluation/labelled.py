"""Data with targets as batches: images of an ImageFolder, with masks or with boxes, and the table beside them, or `.npz` files."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed, row_count
from deploy.data.calibration_set import fit_feed
from deploy.data.image_folder import image_batches, table_files
from deploy.data.npz_folder import LABEL, read_npz, read_npz_folder
from deploy.data.records import RecordInput
from deploy.errors import BackendError, DataError, InputError
from deploy.evaluation.metric import Kind
from deploy.evaluation.profiles import filled
from deploy.evaluation.segmenter import plane
from deploy.runtime.session import Session
from deploy.words import as_utf8, printable

Skip = Callable[[Path, Exception], None]
"""What is done with a file that cannot be used, and the error; it raises where that is not to be left out."""


MOST_KEPT = 256 << 20
"""Bytes of the batches that `Remembered` keeps."""


class Batch(NamedTuple):
    """A feed, the targets of its first rows (the others fill it up), and the files they come from.

    targets: indices of classes (N,), masks (N, H, W), a list of N `Boxes`, or an array (N, ...); None without any.
    """

    feed: Feed
    targets: Any
    files: tuple[Path, ...]


class Labelled(ABC):
    """Data for a model, with targets.

    kind: what the targets are; None: there are none, and none were asked for. root: the folder or file that was named.
    classes: the names of the class folders in the order of the indices; None where it has none. files: all that hold the data, in order.
    """

    kind: Kind | None
    root: Path
    classes: tuple[str, ...] | None = None
    files: tuple[Path, ...]

    @abstractmethod
    def batches(self, batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        """The data in order. Raises DataError and UsageError for a file that cannot be used, unless `skip` takes the error."""

    @abstractmethod
    def some(self, batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        """One batch from all over the data, to try things on; none where no file can be used."""

    @abstractmethod
    def check(self) -> None:
        """Raise DataError where the targets cannot be used; all of them are read, if they are not in memory."""

    @abstractmethod
    def needed(self) -> Sequence[Path]:
        """All files that an evaluation depends on, those of targets and tables too."""

    def batch_size(self, wanted: int) -> tuple[int, str]:
        """The batch size to use in place of `wanted`, and the reason if it is another, else ""."""
        return wanted, ""


class Remembered(Labelled):
    """The batches of other data, read once and kept where they take at most `MOST_KEPT` bytes: for several models that take the same."""

    def __init__(self, data: Labelled) -> None:
        self.kind, self.root, self.classes, self.files = data.kind, data.root, data.classes, data.files
        self._data = data
        self._kept: dict[int, list[Batch]] = {}

    def batches(self, batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        if skip is not None:  # what is left out is said every time
            yield from self._data.batches(batch_size, skip)
            return
        if batch_size in self._kept:
            yield from map(_for_one, self._kept[batch_size])
            return
        kept: list[Batch] = []
        left = MOST_KEPT
        for batch in self._data.batches(batch_size, None):
            left -= sum(array.nbytes for array in batch.feed.values()) + getattr(batch.targets, "nbytes", 0)
            if left >= 0:
                kept.append(_for_one(batch))
            else:
                kept.clear()
            yield batch
        if left >= 0:
            self._kept = {batch_size: kept}

    def some(self, batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        return self._data.some(batch_size, skip)

    def check(self) -> None:
        self._data.check()

    def needed(self) -> Sequence[Path]:
        return self._data.needed()

    def batch_size(self, wanted: int) -> tuple[int, str]:
        return self._data.batch_size(wanted)


def _for_one(batch: Batch) -> Batch:
    """With targets of its own: metrics of users may write to them."""
    return batch._replace(targets=deepcopy(batch.targets))


class Images(Labelled):
    """Image files, with the table of the folder `home`; `targets_of` gives the targets of some of them, by position."""

    def __init__(self, root: Path, home: Path, files: Sequence[Path], source: RecordInput) -> None:
        self.root, self.files = root, tuple(files)
        self._home = home
        self._source = source

    def targets_of(self, indices: Sequence[int]) -> Any:
        return None

    def batch_size(self, wanted: int) -> tuple[int, str]:
        return self._source.batch_size(wanted)

    def batches(self, batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        for error in self._source.missing(self.files):
            if skip is None:
                raise error
            skip(self.root, error)
        yield from self._batches(range(len(self.files)), batch_size, skip)

    def some(self, batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        step = max(len(self.files) // batch_size, 1)
        return islice(self._batches(range(0, len(self.files), step)[:batch_size], batch_size, skip), 1)

    def check(self) -> None:
        pass

    def needed(self) -> Sequence[Path]:
        return [*self.files, *(table_files(self._home, self.files) if self._source.tables else [])]

    def _batches(self, chosen: Sequence[int], batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        samples = [(self.files[index], index) for index in chosen]
        for feed, indices in image_batches(self._source, samples, batch_size, skip=skip):
            yield Batch(feed, self.targets_of(indices.tolist()), tuple(self.files[index] for index in indices))


class Classed(Images):
    """An ImageFolder, with the index of the model's class for each class folder."""

    kind = "classes"

    def __init__(
        self, root: Path, samples: Sequence[tuple[Path, int]], names: tuple[str, ...], indices: Sequence[int], source: RecordInput
    ) -> None:
        super().__init__(root, root, [path for path, _ in samples], source)
        self.classes = names
        self._labels = np.array([indices[folder] for _, folder in samples])

    def targets_of(self, indices: Sequence[int]) -> np.ndarray:
        return np.asarray(self._labels[indices])


class Npz(Labelled):
    """A folder of `.npz` files; `kind` is what their targets must be, `arrays` for any, None for none at all.

    count: of the model's classes, as far as it is known. ignore: of masks, the value that is no class.
    """

    def __init__(
        self,
        artifact: Artifact,
        folder: Path,
        kind: Kind | None,
        indices: Callable[[tuple[str, ...]], Sequence[int]],
        *,
        count: int | None,
        ignore: int,
    ) -> None:
        found = read_npz_folder(folder)
        self.kind = kind
        self.root, self.classes = folder, found.classes
        self.files = tuple(path for path, _ in found.samples)
        self._samples = found.samples
        self._artifact, self._specs = artifact, artifact.manifest.inputs
        self._count, self._ignore = count, ignore
        self._indices = indices(found.classes) if found.classes is not None else ()
        if kind is not None and self.classes is None and not any(map(self._may_have_labels, self.files[:1])):
            what = {"classes": "the index of each row's class", "masks": "the class indices of each row's pixels"}
            raise DataError(
                f"{folder} holds .npz files without labels: {self.files[0].name} has no array {LABEL!r} with"
                f" {what.get(kind, 'the target of each row')}{', and is in no class folder' if kind == 'classes' else ''}"
            )

    def check(self) -> None:
        if self.kind is None or self.classes is not None:
            return
        for path in self.files:
            try:
                arrays, labels = read_npz(path, self._specs)
                feeds = list(fit_feed(arrays, self._specs, 1 << 30, str(path)))
            except DataError:
                continue  # it is told of when its turn comes
            fitting = self._fitting(path, labels, sum(map(row_count, feeds)), arrays)
            if self.kind == "masks":
                self._check_size(path, feeds[0], fitting.shape[1:])
            if self.kind != "arrays":
                check_values([path] * len(fitting), fitting, self._count, self._ignore if self.kind == "masks" else None)

    def _check_size(self, path: Path, feed: Feed, size: tuple[int, ...]) -> None:
        """Raise DataError for masks that are neither of the size of an input nor of an output, as far as these are known."""
        dims = {dim: length for spec in self._specs for dim, length in zip(spec.shape, feed[spec.name].shape, strict=True)}
        taken = [plane(self._artifact, array.shape) for array in feed.values() if array.ndim == 4]
        outputs = [plane(self._artifact, spec.shape) for spec in self._artifact.manifest.outputs if len(spec.shape) > 2]
        given = [tuple(dims.get(dim, dim) for dim in each) for each in outputs]
        if size in (*taken, *given) or any(isinstance(dim, str) for each in given for dim in each):
            return
        sizes = dict.fromkeys("x".join(map(str, each)) for each in (*taken, *given))
        raise DataError(
            f"{printable(path)} has masks of {'x'.join(map(str, size))}; the model takes and gives {' and '.join(sizes)}"
        )

    def needed(self) -> Sequence[Path]:
        return self.files

    def _may_have_labels(self, path: Path) -> bool:
        try:
            return read_npz(path, self._specs)[1] is not None
        except DataError:
            return True  # damaged: it is told of when its turn comes

    def batches(self, batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        for path, folder in self._samples:
            try:
                batches = list(self._read(path, None if self.classes is None else self._indices[folder], batch_size))
            except DataError as error:
                if skip is None:
                    raise
                skip(path, error)
            else:
                yield from batches

    def some(self, batch_size: int, skip: Skip | None) -> Iterator[Batch]:
        return islice(self.batches(batch_size, skip), 1)

    def _read(self, path: Path, label: int | None, batch_size: int) -> Iterator[Batch]:
        arrays, labels = read_npz(path, self._specs)
        feeds = list(fit_feed(arrays, self._specs, batch_size, str(path)))
        rows = [row_count(feed) for feed in feeds]
        if self.kind is None:
            yield from (Batch(feed, None, (path,) * count) for feed, count in zip(feeds, rows, strict=True))
            return
        labels = np.full(sum(rows), label) if label is not None else self._fitting(path, labels, sum(rows), arrays)
        for feed, part in zip(feeds, np.split(labels, np.cumsum(rows)[:-1]), strict=True):
            yield Batch(feed, part, (path,) * len(part))

    def _fitting(self, path: Path, labels: np.ndarray | None, rows: int, arrays: Feed) -> np.ndarray:
        """The targets of a file with `rows` rows of `arrays`. Raises DataError where they are not what they must be."""
        if labels is None:
            what = "the index of each row's class" if self.kind == "classes" else "the target of each row"
            raise DataError(f"{path} has no array {LABEL!r} with {what}")
        if self.kind == "classes" or (self.kind == "arrays" and labels.ndim == 0):
            labels = np.atleast_1d(labels)
        single = all(arrays[spec.name].ndim < len(spec.shape) for spec in self._specs)  # one sample, without the batch
        if (self.kind == "masks" and labels.ndim == 2) or (self.kind == "arrays" and single and len(labels) != 1):
            labels = labels[None]
        shape = f"{labels.dtype} {labels.shape}"
        if self.kind == "classes" and (labels.dtype.kind not in "iu" or labels.shape != (rows,)):
            raise DataError(f"{path}: {LABEL!r} is {shape}; expected {rows} indices of classes")
        if self.kind == "masks" and (labels.dtype.kind not in "iu" or labels.ndim != 3 or len(labels) != rows):
            raise DataError(f"{path}: {LABEL!r} is {shape}; expected {rows} masks of class indices, height x width")
        if len(labels) != rows:
            raise DataError(f"{path}: {LABEL!r} is {shape}; expected one target for each of {rows} rows")
        return labels


def check_values(files: Sequence[Path], targets: np.ndarray, count: int | None, ignore: int | None = None) -> None:
    """Raise DataError for an index that is none of `count` classes (None: that is not known), and not `ignore`.

    targets: the labels or masks of one row of each file, (len(files), ...).
    """
    wrong = (targets != ignore) & ((targets < 0) | (targets >= (np.inf if count is None else count)))
    if not wrong.any():
        return
    path, value = files[int(np.nonzero(wrong)[0][0])], targets[wrong][0]
    expected = f"0 to {count - 1}" if count is not None else "0 or more"
    if ignore is None:
        raise DataError(f"{printable(path)} has the label {value}; expected {expected}")
    raise DataError(
        f"{printable(path)} has the value {value} in its mask; expected {expected}, and {ignore} for what is to be ignored"
        " (`ignore_index`)"
    )


def files_request(data: Labelled) -> list[list[Any]]:
    """The path, size and modification time of all files that an evaluation on `data` depends on."""
    stats = [(path, path.stat()) for path in data.needed()]
    home = data.root if data.root.is_dir() else data.root.parent
    return [[as_utf8(os.path.relpath(path, home)), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def run_batch(session: Session, batch: Batch, skip: Skip | None) -> Feed | None:
    """The results of a batch, which may be more rows than it has files; None where it is one file that the model does not run with and `skip` takes the error."""
    try:
        return dict(session.run(filled(session, batch.feed)))
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
