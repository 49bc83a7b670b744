"""Predictions for any number of files: decoded ahead of need, computed in batches, one row an image, in order."""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.placement import Placement
from deploy.artifact.tensors import Feed
from deploy.data.calibration_set import fit_feed
from deploy.data.npz_folder import read_npz
from deploy.data.records import RecordInput, record_input
from deploy.data.sources import is_npz
from deploy.errors import BackendError, DataError, DeployError, InputError, UsageError, UserCodeError
from deploy.evaluation.classifier import warn_if_null
from deploy.evaluation.detector import placement_of
from deploy.evaluation.many_options import BatchOptions
from deploy.evaluation.profiles import filled, filled_rows, nearest_batch
from deploy.evaluation.results import Reader, Result
from deploy.runtime.load import load
from deploy.words import as_utf8

_AHEAD = 3
"""Batches whose images are decoded or being decoded while one is computed."""

_BEHIND = 1
"""Batches whose results are being read while one is computed."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A file of the work. start: the first row that is wanted of an `.npz` file."""

    path: Path
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one image, or of one row of an `.npz` file: a result, or an error."""

    path: str
    row: int | None = None
    result: Result | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"path": self.path}
        if self.row is not None:
            document["row"] = self.row
        return {**document, **({"error": self.error} if self.result is None else self.result.values)}


def check_artifact(artifact: Artifact, options: BatchOptions) -> Reader:
    """What reads the outputs of `artifact`. Raises UsageError for one whose results cannot stand in rows of files."""
    reader = Reader(artifact, options)
    if len(artifact.manifest.inputs) == 1 and artifact.manifest.preprocess is not None:
        (image,) = record_input(artifact, [Path()]).images
        if image.preprocess.function is not None and reader.kind in ("segment", "detect"):
            image.preprocess.placement(1, 1)  # raises: there is no way back from a function
    return reader


class Predictor:
    """An open session with what makes rows of files. Used with `with`."""

    def __init__(self, artifact: Artifact, options: BatchOptions) -> None:
        self._reader = check_artifact(artifact, options)
        self._artifact = artifact
        self._options = options
        self._images: RecordInput | None = None
        self._size = options.batch_size
        if len(artifact.manifest.inputs) == 1 and artifact.manifest.preprocess is not None:
            self._images = record_input(artifact, [Path()])
            self._size, _ = self._images.batch_size(options.batch_size)
            for image in self._images.images:
                image.preprocess.load_function()
        self._session = load(artifact, options.backend, options.device, threads=options.threads)
        self._size, _ = nearest_batch(self._session, self._size, "")
        warn_if_null(self._session.backend)
        workers = options.workers or min(8, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
        self._reading = ThreadPoolExecutor(workers, thread_name_prefix="results")
        self._depth = max(_AHEAD * self._size, 2 * workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._reading.shutdown(cancel_futures=True)
        self._session.close()

    def rows(self, items: Iterator[Item]) -> Iterator[list[Row]]:
        """The rows of all items, in order, as many at a time as were computed together."""
        behind: deque[_Rows] = deque()
        for made in self._computed(items):
            behind.append(made)
            while len(behind) > _BEHIND:
                yield _wait(behind.popleft())
        while behind:
            yield _wait(behind.popleft())

    def _computed(self, items: Iterator[Item]) -> Iterator["_Rows"]:
        """The rows as they will be: what was computed is read while the next batch is."""
        ahead: deque[tuple[Item, Future[_Loaded] | None]] = deque()
        waiting: list[tuple[Item, _Loaded]] = []
        while True:
            for item in itertools.islice(items, self._depth - len(ahead)):
                ahead.append((item, None if is_npz(item.path) else self._pool.submit(self._load, item.path)))
            if not ahead:
                break
            item, loading = ahead.popleft()
            if loading is None:
                yield from self._images_of(waiting)
                waiting = []
                yield from self._npz(item)
                continue
            try:
                loaded = loading.result()
            except DeployError as error:
                yield from self._images_of(waiting)
                yield [_failed(item.path, error)]
                waiting = []
                continue
            if waiting and any(loaded[0][name].shape != array.shape for name, array in waiting[0][1][0].items()):
                yield from self._images_of(waiting)
                waiting = []
            waiting.append((item, loaded))
            if len(waiting) == self._size:
                yield from self._images_of(waiting)
                waiting = []
        yield from self._images_of(waiting)

    def _load(self, path: Path) -> "_Loaded":
        if self._images is None:
            raise UsageError("the model takes more than an image: give .npz files, or leave --out out for images with a table")
        feed = self._images.load(path)
        wanted = self._reader.kind in ("segment", "detect")
        return feed, placement_of(self._images.images[0].preprocess, path) if wanted else None

    def _images_of(self, items: Sequence[tuple[Item, "_Loaded"]]) -> Iterator["_Rows"]:
        """The rows of decoded images. If the model does not run with them, each is tried alone."""
        if not items:
            return
        rows = len(items)
        index = np.arange(self._size if self._is_fixed else filled_rows(self._session, rows)).clip(max=rows - 1)
        try:
            feed = {name: np.stack([loaded[0][name] for _, loaded in items])[index] for name in items[0][1][0]}
            outputs = self._session.run(feed)
        except (InputError, BackendError) as error:
            if rows == 1:
                yield [_failed(items[0][0].path, error)]
            for item in items if rows > 1 else ():
                yield from self._images_of([item])
            return
        named = [Row(path=as_utf8(item.path)) for item, _ in items]
        yield self._reading.submit(self._read, named, outputs, [loaded[1] for _, loaded in items])

    @property
    def _is_fixed(self) -> bool:
        return isinstance(self._artifact.manifest.inputs[0].shape[0], int)

    def _npz(self, item: Item) -> Iterator["_Rows"]:
        row = 0
        try:
            arrays, _ = read_npz(item.path, self._artifact.manifest.inputs)
            size, _ = nearest_batch(self._session, self._options.batch_size, "")
            for feed in fit_feed(arrays, self._artifact.manifest.inputs, size, str(item.path)):
                count = len(next(iter(feed.values())))
                if row + count > item.start:
                    outputs, skipped = self._session.run(filled(self._session, feed)), max(item.start - row, 0)
                    named = [Row(path=as_utf8(item.path), row=row + at) for at in range(skipped, count)]
                    rest = {name: array[skipped:count] for name, array in outputs.items()}
                    yield self._reading.submit(self._read, named, rest, [None] * len(named))
                row += count
        except DeployError as error:
            yield [_failed(item.path, error)]

    def _read(self, rows: Sequence[Row], outputs: Feed, places: Sequence[Placement | None]) -> list[Row]:
        """The rows with their results. Where these cannot be read together, each is tried alone."""
        try:
            return [replace(row, result=made) for row, made in zip(rows, self._reader.read(outputs, places), strict=True)]
        except (DataError, InputError, UserCodeError) as error:
            if len(rows) == 1:
                return [replace(rows[0], error=as_utf8(str(error)))]
            alone = [{name: array[at : at + 1] for name, array in outputs.items()} for at in range(len(rows))]
            return [self._read([row], each, [place])[0] for row, each, place in zip(rows, alone, places, strict=True)]


_Loaded = tuple[Feed, Placement | None]
"""An image as the model takes it, and where the picture lies in it."""

_Rows = Future[list[Row]] | list[Row]


def _wait(rows: _Rows) -> list[Row]:
    return rows if isinstance(rows, list) else rows.result()


def _failed(path: Path, error: Exception) -> Row:
    return Row(path=as_utf8(path), error=as_utf8(str(error)))
