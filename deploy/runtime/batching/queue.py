"""The queue of requests that wait for a session, and the joining and splitting of their arrays.

Requests are ordered by priority, then by arrival, and counted in rows.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deploy.errors import BackendError

NORMAL_PRIORITY = 100

Outputs = dict[str, np.ndarray]


class RequestTimes(NamedTuple):
    """When a request came, when its batch was begun, and when that had run: seconds on the performance counter."""

    came: float
    began: float
    ran: float


class Request:
    """A request. rows: of its feed. key: equal for requests that can share a batch. timeout_s: how long it may wait, or None; `deadline` is
    then its end on the performance counter. times: set before it is finished, unless it never ran.

    start: called when the request is taken; returns False if it was cancelled. finish: called once after that, with the outputs or
    an error.
    """

    __slots__ = ("came", "deadline", "feed", "finish", "key", "number", "priority", "rows", "start", "times")

    def __init__(
        self,
        feed: Mapping[str, np.ndarray],
        *,
        rows: int,
        key: Any,
        priority: int,
        timeout_s: float | None,
        start: Callable[[], bool],
        finish: Callable[[Outputs | None, Exception | None], None],
    ) -> None:
        self.feed = feed
        self.rows = rows
        self.key = key
        self.priority = priority
        self.start = start
        self.finish = finish
        self.came = time.perf_counter()
        self.deadline = None if timeout_s is None else self.came + timeout_s
        self.number = -1
        self.times: RequestTimes | None = None


class RequestQueue:
    """The waiting requests. Not safe to use from several threads: callers that share it must hold a lock.

    rows: of all requests together.
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
        """The next request to be taken. Raises StopIteration if the queue is empty."""
        return next(iter(self))

    def holds(self, rows: int) -> bool:
        """Whether this many rows wait that can share a batch with the first request."""
        key = self.first.key
        waiting = 0
        for request in self:
            if request.key == key:
                waiting += request.rows
                if waiting >= rows:
                    return True
        return False

    def take(self, most_rows: int | None) -> list[Request]:
        """Remove and return the first request and those that fit into a batch of `most_rows` with it; None: the first alone.

        It stops at the first request of the same key that does not fit, so that none is passed over for ever.
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

    def take_all(self) -> list[Request]:
        taken = list(self)
        self._by_priority.clear()
        self.rows = 0
        return taken


class BatchRecord(NamedTuple):
    """The times and the outcome of one batch.

    rows: in the batch. queue_s, total_s: seconds of each request from its arrival until it was taken, and until it was answered.
    input_s, infer_s, output_s: seconds to join the inputs, to run the session, and to take the outputs apart. error: of the run.
    """

    rows: int
    queue_s: Sequence[float]
    total_s: Sequence[float]
    input_s: float
    infer_s: float
    output_s: float
    error: Exception | None = None


class Joiner:
    """Joins the feeds of requests, up to `most_rows`, in memory that the next batch reuses."""

    _KEPT = 4
    """The most arrays per input: there may be any number of shapes that come only once."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._arrays: OrderedDict[tuple[Any, ...], np.ndarray] = OrderedDict()

    def join(self, requests: Sequence[Request]) -> dict[str, np.ndarray]:
        """One feed, whose arrays (rows of all, ...) follow the order of the requests. Their shapes differ only in the rows."""
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
    """The outputs of each request, in new arrays. rows: the rows of each request.

    They are copies: a caller that keeps its rows must neither keep nor see those of others. Raises BackendError if the outputs do not
    have as many rows as all requests together.
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
