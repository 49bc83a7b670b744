"""Calibration data: images of an ImageFolder, a folder of `.npz` feeds, or feeds in memory."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import file_digest, request_digest
from deploy.artifact.tensors import Feed, TensorSpec, batch_dim, batched, format_specs, slice_rows
from deploy.calibration.imagefolder import Sample
from deploy.data.image_folder import image_batches, read_images, samples_digest
from deploy.data.npz_folder import holds_npz, read_npz, read_npz_folder
from deploy.data.records import record_input
from deploy.errors import DataError, InputError, UsageError
from deploy.words import as_utf8, printable

logger = logging.getLogger(__name__)

IMAGES = 512
"""The default number of images or `.npz` files."""

SKIPPED = 0.05
"""The share of images that may be unreadable. If there are more, something is wrong with the folder."""

_NAMED = 5


class CalibrationSet(ABC):
    """Feeds for the inputs `specs`, always in the same order.

    count: the number of images or files; None if it is not known before they are read.
    skipped: after reading, the files that could not be read.
    """

    kind: Literal["images", "npz", "feeds"]
    count: int | None = None

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self.skipped: list[str] = []

    @abstractmethod
    def digest(self) -> str | None:
        """The SHA-256 of the content, in order; None if it can be read only once."""

    @abstractmethod
    def feeds(self, batch_size: int) -> Iterator[Feed]:
        """The feeds, with at most `batch_size` rows if the batch is symbolic. Raises DataError or UsageError."""


class _Images(CalibrationSet):
    kind = "images"

    def __init__(self, artifact: Artifact, folder: Path, count: int | None, most: int) -> None:
        super().__init__(artifact.manifest.inputs)
        images = read_images(folder)
        folder = images.root
        self._source = record_input(artifact, [folder])
        self._folder = folder
        self._samples: Sequence[Sample] = images.sample(count or most)
        self.count = len(self._samples)
        if count is not None and self.count < count:
            logger.warning("%d images were asked for; %s holds %d: all of them are used", count, folder, self.count)
        if gone := self._source.missing([path for path, _ in images.samples]):
            logger.warning("%s%s", gone[0], f", nor {len(gone) - 1} more" if gone[1:] else "")
        if len(images.classes) == 1 and images.classes[0] and most == IMAGES:
            logger.warning("%s holds one class only, %r: the scales will fit its images", folder, images.classes[0])

    def digest(self) -> str:
        return samples_digest(self._samples, self._folder if self._source.tables else None)

    def feeds(self, batch_size: int) -> Iterator[Feed]:
        self.skipped = []
        self._reason = ""
        size, _ = self._source.batch_size(batch_size)
        for feed, _ in image_batches(self._source, self._samples, size, skip=self._skip):
            yield feed
        if self.skipped:
            shown = ", ".join(self.skipped[:_NAMED]) + ("..." if len(self.skipped) > _NAMED else "")
            reason = f"; the first: {as_utf8(self._reason)}" if self._source.tables else ""
            logger.warning("%d of %d images cannot be read and were left out: %s%s", len(self.skipped), self.count, shown, reason)

    def _skip(self, path: Path, error: Exception) -> None:
        if not isinstance(error, DataError):
            raise error
        self.skipped.append(printable(path))
        self._reason = self._reason or str(error)
        if len(self.skipped) > max(1, int(SKIPPED * len(self._samples))):
            raise DataError(
                f"{self._folder}: over {SKIPPED:.0%} of {self.count} images cannot be read, among them"
                f" {', '.join(self.skipped[:_NAMED])}; remove or replace them. The first: {as_utf8(self._reason)}"
            ) from error


class _NpzFiles(CalibrationSet):
    kind = "npz"

    def __init__(self, artifact: Artifact, folder: Path, count: int | None, most: int) -> None:
        super().__init__(artifact.manifest.inputs)
        samples = read_npz_folder(folder).sample(count or most)
        self._files = [path for path, _ in samples]
        self.count = len(self._files)
        if count is not None and self.count < count:
            logger.warning("%d feeds were asked for; %s holds %d: all of them are used", count, folder, self.count)

    def digest(self) -> str:
        return request_digest({"npz": [file_digest(path) for path in self._files]})

    def feeds(self, batch_size: int) -> Iterator[Feed]:
        for path in self._files:
            arrays, _ = read_npz(path, self.specs)
            yield from fit_feed(arrays, self.specs, batch_size, str(path))


class _Feeds(CalibrationSet):
    kind = "feeds"

    def __init__(self, artifact: Artifact, feeds: Iterable[Mapping[str, np.ndarray]], count: int | None) -> None:
        super().__init__(artifact.manifest.inputs)
        self._feeds = feeds
        self._limit = count

    def digest(self) -> str | None:
        if not isinstance(self._feeds, Sequence):
            return None
        digest = hashlib.sha256()
        for feed in self._feeds[: self._limit]:
            for name in sorted(feed):
                array = np.ascontiguousarray(feed[name])
                digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def feeds(self, batch_size: int) -> Iterator[Feed]:
        for index, feed in enumerate(self._feeds):
            if index == self._limit:
                return
            yield from fit_feed(feed, self.specs, batch_size, f"calibration feed {index}")


def calibration_set(
    artifact: Artifact, data: Path | str | Iterable[Mapping[str, np.ndarray]], count: int | None = None, *, most: int = IMAGES
) -> CalibrationSet:
    """The first `count` feeds of `data` for `artifact`. Images are a random sample, drawn evenly over the classes.

    A folder of `.npz` files has feeds: directly, or in class folders; any other folder must be an ImageFolder, with a table
    where the model takes more than an image (`deploy.data.table`). The default of `count`
    is `most` for a folder, or fewer if it has fewer, and all of an iterable. Raises DataError for a folder that cannot be
    used, UsageError if the artifact takes no images or `count` is below 1.
    """
    if count is not None and count < 1:
        raise UsageError(f"the number of images must be 1 or more, not {count}")
    if not isinstance(data, (str, Path)):
        return _Feeds(artifact, data, count)
    folder = Path(data)
    if holds_npz(folder):
        return _NpzFiles(artifact, folder, count, most)
    try:
        return _Images(artifact, folder, count, most)
    except UsageError as error:
        raise UsageError(f"{error}; or give a folder of .npz files, one array an input in each") from error


def fit_feed(feed: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], batch_size: int, what: str) -> Iterator[Feed]:
    """`feed` as the model takes it: with a batch dimension, and in pieces of `batch_size` rows if all begin with a symbolic batch."""
    names = [spec.name for spec in specs]
    if sorted(feed) != sorted(names):
        raise DataError(f"{what} holds {', '.join(sorted(feed)) or 'nothing'}; expected {format_specs(specs)}")
    arrays: Feed = {}
    dims: dict[str, int] = {}
    batch = batch_dim(specs)
    for spec in specs:
        array = np.asarray(feed[spec.name])
        if array.ndim == len(spec.shape) - 1:
            array = np.expand_dims(array, spec.shape.index(batch) if batch in spec.shape else 0)
        if array.dtype.kind == "f" and spec.dtype.startswith("float"):
            array = array.astype(spec.dtype, copy=False)
        try:
            spec.check(str(array.dtype), array.shape, dims)
        except InputError as error:
            raise DataError(f"{what}: {error}") from error
        arrays[spec.name] = array
    if batch is None or not batched(specs):
        yield arrays
        return
    for start in range(0, dims[batch], batch_size):
        yield slice_rows(arrays, start, start + batch_size)
