"""Predictions for any number of files: decoded ahead of need, computed in batches, one row an image, in order."""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed
from deploy.data.calibration_set import fit_feed
from deploy.data.npz_folder import read_npz
from deploy.data.records import RecordInput, record_input
from deploy.data.sources import is_npz
from deploy.errors import BackendError, DeployError, InputError, UsageError
from deploy.evaluation.classifier import check_names, class_scores, likeliest, warn_if_null
from deploy.evaluation.many_options import BatchOptions
from deploy.runtime.load import load
from deploy.words import as_utf8

_AHEAD = 3
"""Batches whose images are decoded or being decoded while one is computed."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A file of the work. start: the first row that is wanted of an `.npz` file."""

    path: Path
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one image, or of one row of an `.npz` file: the likeliest classes with their probabilities, or an error."""

    path: str
    row: int | None = None
    classes: tuple[tuple[str, float], ...] | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"path": self.path}
        if self.row is not None:
            document["row"] = self.row
        if self.classes is None:
            return {**document, "error": self.error}
        return {**document, "classes": [{"class": name, "probability": p} for name, p in self.classes]}


def check_artifact(artifact: Artifact, options: BatchOptions) -> None:
    """Raise UsageError for an artifact that is no classifier, or that takes more than the file."""
    class_scores(artifact)
    if len(artifact.manifest.inputs) == 1:
        record_input(artifact, [Path()])


class Predictor:
    """An open session with what makes rows of files. Used with `with`."""

    def __init__(self, artifact: Artifact, options: BatchOptions) -> None:
        check_artifact(artifact, options)
        self._artifact = artifact
        self._options = options
        self._scores = class_scores(artifact)
        self._images: RecordInput | None = None
        self._size = options.batch_size
        if len(artifact.manifest.inputs) == 1:
            self._images = record_input(artifact, [Path()])
            self._size, _ = self._images.batch_size(options.batch_size)
            for image in self._images.images:
                image.preprocess.load_function()
        self._session = load(artifact, options.backend, options.device, threads=options.threads)
        warn_if_null(self._session.backend)
        workers = options.workers or min(8, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
        self._depth = max(_AHEAD * self._size, 2 * workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._session.close()

    def rows(self, items: Iterator[Item]) -> Iterator[list[Row]]:
        """The rows of all items, in order, as many at a time as were computed together."""
        ahead: deque[tuple[Item, Future[Feed] | None]] = deque()
        waiting: list[tuple[Item, Feed]] = []
        while True:
            for item in itertools.islice(items, self._depth - len(ahead)):
                ahead.append((item, None if is_npz(item.path) else self._pool.submit(self._decode, item.path)))
            if not ahead:
                break
            item, loading = ahead.popleft()
            if loading is None:
                yield self._computed(waiting)
                waiting = []
                yield from self._npz(item)
                continue
            try:
                feed = loading.result()
            except DeployError as error:
                yield [*self._computed(waiting), _failed(item.path, error)]
                waiting = []
                continue
            if waiting and any(feed[name].shape != array.shape for name, array in waiting[0][1].items()):
                yield self._computed(waiting)
                waiting = []
            waiting.append((item, feed))
            if len(waiting) == self._size:
                yield self._computed(waiting)
                waiting = []
        yield self._computed(waiting)

    def _decode(self, path: Path) -> Feed:
        if self._images is None:
            raise UsageError("the model takes more than an image: give .npz files, or leave --out out for images with a table")
        return self._images.load(path)

    def _computed(self, items: Sequence[tuple[Item, Feed]]) -> list[Row]:
        """The rows of decoded images. If the model does not run with them, each is tried alone."""
        if not items:
            return []
        rows = len(items)
        index = np.arange(self._size if self._is_fixed else rows).clip(max=rows - 1)
        try:
            feed = {name: np.stack([each[1][name] for each in items])[index] for name in items[0][1]}
            found = self._classes(feed, rows)
        except (InputError, BackendError) as error:
            if rows == 1:
                return [_failed(items[0][0].path, error)]
            return [row for item in items for row in self._computed([item])]
        return [Row(path=as_utf8(item.path), classes=classes) for (item, _), classes in zip(items, found, strict=True)]

    @property
    def _is_fixed(self) -> bool:
        return isinstance(self._artifact.manifest.inputs[0].shape[0], int)

    def _npz(self, item: Item) -> Iterator[list[Row]]:
        row = 0
        try:
            arrays, _ = read_npz(item.path, self._artifact.manifest.inputs)
            for feed in fit_feed(arrays, self._artifact.manifest.inputs, self._options.batch_size, str(item.path)):
                count = len(next(iter(feed.values())))
                if row + count > item.start:
                    found = self._classes(feed, count)
                    made = [Row(path=as_utf8(item.path), row=row + at, classes=each) for at, each in enumerate(found)]
                    yield made[max(item.start - row, 0) :]
                row += count
        except DeployError as error:
            yield [_failed(item.path, error)]

    def _classes(self, feed: Feed, rows: int) -> list[tuple[tuple[str, float], ...]]:
        scores = self._session.run(feed)[self._scores.name][:rows]
        check_names(self._artifact, scores.shape[1])
        return likeliest(scores, self._artifact.manifest.classes, self._options.top)


def _failed(path: Path, error: Exception) -> Row:
    return Row(path=as_utf8(path), error=as_utf8(str(error)))
