"""The rows of a calibration set, which are counted, and the first of which are kept for the audit."""

from collections import deque
from collections.abc import Iterator, Mapping
from threading import Lock

import numpy as np

from deploy.artifact.tensors import Feed, batched, row_count, slice_rows
from deploy.data.calibration_set import CalibrationSet
from deploy.host.memory import trim
from deploy.progress import Progress

AUDIT_SHARE, AUDIT_LEAST, AUDIT_MOST = 16, 8, 32
"""One in 16 calibration rows is used for the bias correction and the noise of the layers, but at least 8 and at most 32, which are kept in memory."""
SAMPLE_ROWS = 4
"""Rows that ranges are compared on. A few are enough, because every position of an image is a sample."""
KEPT_BYTES = 100 << 20
"""The limit for the tensors kept of those rows, so that they need not be run again; memory must not grow with the rows."""


class Rows:
    """The feeds of a calibration set, to be iterated over once; counts their rows and keeps the first ones.

    count: rows so far.
    kept: the first feeds, each with its tensors and outputs, or None if they would exceed KEPT_BYTES.
    """

    def __init__(self, data: CalibrationSet, batch_size: int, progress: Progress) -> None:
        self.count = 0
        self.kept: list[tuple[Feed, tuple[Feed, Feed] | None]] = []
        self._data = data
        self._progress = progress
        self._wanted = min(max(AUDIT_LEAST, (data.count or AUDIT_MOST) // AUDIT_SHARE), AUDIT_MOST)
        self._room = KEPT_BYTES
        self._lock = Lock()
        self._feeds = data.feeds(batch_size)
        self._read: deque[Feed] = deque()

    def __iter__(self) -> Iterator[Feed]:
        symbolic = batched(self._data.specs)
        while (feed := self._read.popleft() if self._read else next(self._feeds, None)) is not None:
            self._progress("calibrating", self.count, self._data.count or 0)
            missing = self._wanted - self.count
            if missing > 0:
                self.kept.append((slice_rows(feed, 0, missing) if symbolic and missing < row_count(feed) else feed, None))
            yield feed
            self.count += row_count(feed)

    def head(self, wanted: int) -> Iterator[Feed]:
        """The first `wanted` rows, one at a time, or a little more where they cannot be divided; they come again when iterated over."""
        symbolic = batched(self._data.specs)
        while wanted > 0 and (feed := next(self._feeds, None)) is not None:
            self._read.append(feed)
            count = row_count(feed)
            for index in range(min(count, wanted) if symbolic else 1):
                yield slice_rows(feed, index, index + 1) if symbolic else feed
            wanted -= count

    def seen(self, feed: Mapping[str, np.ndarray], tensors: Feed, outputs: Feed) -> None:
        """Keep the tensors and outputs of a feed if the whole feed is kept. Safe to call from several threads."""
        size = sum(array.nbytes for array in (*tensors.values(), *outputs.values()))
        with self._lock:
            index = next((index for index, (kept, _) in enumerate(self.kept) if kept is feed), None)
            if index is not None and size <= self._room:
                self._room -= size
                self.kept[index] = (self.kept[index][0], (tensors, outputs))

    def sample(self) -> Iterator[Feed]:
        """The first SAMPLE_ROWS rows, or a little more where they cannot be divided."""
        missing = SAMPLE_ROWS
        for feed, _ in self.kept:
            if missing > 0:
                whole = not batched(self._data.specs) or row_count(feed) <= missing
                yield feed if whole else slice_rows(feed, 0, missing)
                missing -= row_count(feed)

    def runs(self) -> Iterator[tuple[Feed, tuple[Feed, Feed] | None]]:
        """The kept feeds, each with its tensors and outputs, if they were kept: only the caller has them then."""
        for index, (feed, _) in enumerate(self.kept):
            trim()  # of the feed before, for the runs that are still kept
            yield feed, self._taken(index)
        trim()

    def _taken(self, index: int) -> tuple[Feed, Feed] | None:
        feed, run = self.kept[index]
        self.kept[index] = (feed, None)
        return run


def first_rows(feed: Feed, outputs: Feed, data: CalibrationSet, wanted: int) -> tuple[Feed, Feed]:
    """The first `wanted` rows of a feed and its outputs; all rows if the batch is fixed or an output has no batch axis."""
    rows = row_count(feed)
    if not batched(data.specs) or any(not array.ndim or len(array) != rows for array in outputs.values()):
        return feed, outputs
    return slice_rows(feed, 0, wanted), slice_rows(outputs, 0, wanted)
