"""Requests that wait for a session: by priority, then in the order in which they came, counted in rows; and their arrays."""

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.errors import BackendError

NORMAL_PRIORITY = 100

Outputs = dict[str, np.ndarray]


class Request:
    """One request. rows: of its feed; key: what must be alike in one batch; deadline: on the performance counter, None for none.

    start: called when it is taken; False where it was cancelled. finish: called once after that, with the outputs or an error.
    """

    __slots__ = ("came", "deadline", "feed", "finish", "key", "number", "priority", "rows", "start")

    def __init__(
        self,
        feed: Mapping[str, np.ndarray],
        *,
        rows: int,
        key: Any,
        priority: int,
        deadline: float | None,
        start: Callable[[], bool],
        finish: Callable[[Outputs | None, Exception | None], None],
    ) -> None:
        self.feed = feed
        self.rows = rows
        self.key = key
        self.priority = priority
        self.deadline = deadline
        self.start = start
        self.finish = finish
        self.came = time.perf_counter()
        self.number = -1


class RequestQueue:
    """What waits. Not safe to use from several threads: whoever shares it holds a lock.

    rows: of all that waits.
    """

    def __init__(self) -> None:
        self._by_priority: dict[int, OrderedDict[int, Request]] = {}
        self._numbers = itertools.count()
        self.rows = 0

    def __len__(self) -> int:
        return sum(map(len, self._by_priority.values()))

    def __bool__(self) -> bool:
        return bool(self._by_priority)

    def __iter__(self) -> Iterator[Request]:
        return itertools.chain.from_iterable(queue.values() for queue in self._by_priority.values())

    def __contains__(self, request: Request) -> bool:
        return request.number in self._by_priority.get(request.priority, ())

    def put(self, request: Request) -> None:
        request.number = next(self._numbers)
        queue = self._by_priority.get(request.priority)
        if queue is None:
            queue = self._by_priority[request.priority] = OrderedDict()
            self._by_priority = dict(sorted(self._by_priority.items()))
        queue[request.number] = request
        self.rows += request.rows

    def remove(self, request: Request) -> None:
        queue = self._by_priority[request.priority]
        del queue[request.number]
        self.rows -= request.rows
        if not queue:
            del self._by_priority[request.priority]

    @property
    def first(self) -> Request:
        """The next to be taken. Raises StopIteration where nothing waits."""
        return next(iter(self))

    def holds(self, rows: int) -> bool:
        """Whether as many rows wait that could go with the first."""
        key = self.first.key
        found = 0
        for request in self:
            if request.key == key:
                found += request.rows
                if found >= rows:
                    return True
        return False

    def take(self, most_rows: int | None) -> list[Request]:
        """The first, and what fits into a batch of `most_rows` with it, in order; None: the first alone.

        It stops at the first of its sort that does not fit, so that none is passed over for ever.
        """
        first = self.first
        taken: list[Request] = []
        rows = 0
        for request in self if most_rows is not None else (first,):
            if request.key == first.key:
                if most_rows is not None and rows + request.rows > most_rows:
                    break
                taken.append(request)
                rows += request.rows
                if rows == most_rows:
                    break
        for request in taken:
            self.remove(request)
        return taken


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """What became of one batch.

    rows: in it. queue_s, total_s: seconds of each request, from its coming to its being taken, and to its answer. input_s, infer_s,
    output_s: seconds of putting the inputs together, of the session's run, and of taking the outputs apart. error: what failed it.
    """

    rows: int
    queue_s: Sequence[float]
    total_s: Sequence[float]
    input_s: float
    infer_s: float
    output_s: float
    error: Exception | None = None


class Joiner:
    """Puts the feeds of requests together, `most_rows` at most, in memory that the next batch uses again."""

    _KEPT = 4
    """Arrays at most: of shapes that come once there may be any number."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._arrays: OrderedDict[tuple[Any, ...], np.ndarray] = OrderedDict()

    def join(self, requests: Sequence[Request]) -> dict[str, np.ndarray]:
        """One feed: each array (rows of all, ...), in the order of the requests. They are alike but for the rows."""
        rows = sum(request.rows for request in requests)
        feed = {}
        for name, first in requests[0].feed.items():
            key = (name, first.shape[1:])
            whole = self._arrays.pop(key, None)
            if whole is None:
                if len(self._arrays) >= self._KEPT * len(requests[0].feed):
                    self._arrays.popitem(last=False)
                whole = np.empty((self._most_rows, *first.shape[1:]), dtype=first.dtype)
            self._arrays[key] = whole
            feed[name] = np.concatenate([request.feed[name] for request in requests], out=whole[:rows])
        return feed


def apart(outputs: Outputs, rows: Sequence[int]) -> list[Outputs]:
    """The outputs of each of the requests that have so many rows, in arrays of their own.

    Copies: a caller that keeps its rows must not keep those of all others, nor see them. Raises BackendError where the outputs have
    not as many rows as all of them.
    """
    for name, array in outputs.items():
        if len(array) != sum(rows):
            raise BackendError(
                f"the model gave {len(array)} rows for {sum(rows)} in {name!r}: it does not keep to its batch dimension"
            )
    ends = itertools.accumulate(rows)
    return [
        {name: array[end - count : end].copy() for name, array in outputs.items()} for count, end in zip(rows, ends, strict=True)
    ]
