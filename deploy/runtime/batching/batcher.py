"""Dynamic batching: requests of a few rows each become batches of a session, and every caller gets its own rows back.

    with Batcher(session, BatcherOptions(max_rows=16, delay_ms=2)) as batcher:
        outputs = batcher.run({"input": x})                    # waits
        future = batcher.submit({"input": x}, priority=1)      # concurrent.futures.Future
        outputs = await batcher.run_async({"input": x})        # asyncio; cancelling the task cancels the request

Only requests whose shapes differ in nothing but the rows share a batch. Two threads serve each instance: while one runs the
session, the other hands out the previous results; as soon as the session is free, it takes the next batch.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from deploy.artifact.tensors import rows_join
from deploy.errors import DeadlineError, InputError, QueueFullError, SessionClosedError, UsageError
from deploy.options import option
from deploy.runtime.batching.execution import Done, execute, hand_out, ours, run
from deploy.runtime.batching.queue import NORMAL_PRIORITY, BatchRecord, Joiner, Outputs, Request, RequestQueue, RequestTimes
from deploy.runtime.lifetime import ProcessBound, ServiceThread, bind, leave_if_ending
from deploy.runtime.session import Session
from deploy.runtime.tasks import RunFuture

logger = logging.getLogger("deploy.runtime")

DEFAULT_ROWS = 32
"""The most rows of a batch if neither the options nor a profile set a limit."""

INLINE_S = 2e-4
"""A run that takes at most this long is made in the event loop itself."""


@dataclass(frozen=True, kw_only=True)
class BatcherOptions:
    """How to batch.

    max_rows: the most rows of a batch; None: the most that a profile of the session takes, else `DEFAULT_ROWS`. If any input or
        output lacks a symbolic batch dimension, each request is a batch, of any size.
    delay_ms: how long the first request of a batch waits for others. With 0, a batch is all that waits when the session is free.
    instances: None for the session's `concurrency`.
    """

    max_rows: int | None = option(
        None, "The most rows of a batch.", flag="--max-batch", metavar="N", default="what the profile takes, or 32"
    )
    delay_ms: float = option(0.0, "How long the first request of a batch waits for others.", metavar="MS")
    queue_rows: int = option(1024, "The most rows that may wait for a model; beyond: 503.", flag="--queue", metavar="N")
    instances: int | None = option(None, "Batches in a model at a time.", metavar="N", default="what its backend can use")

    def __post_init__(self) -> None:
        for name in ("max_rows", "queue_rows", "instances"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{name}` must be 1 or more, not {value}")
        if not 0 <= self.delay_ms < 1e6:
            raise UsageError(f"`delay_ms` must be 0 or more, not {self.delay_ms:g}")


class Batcher(ProcessBound):
    """Runs requests on a session in batches. Safe to use from many threads and event loops; the caller closes the session.

    observe: called with a record of every batch, from the batcher's threads.
    """

    _instead = "a batcher cannot be pickled or copied: make one in the process that uses it, of a session that is loaded there"

    def __init__(
        self,
        session: Session,
        options: BatcherOptions | None = None,
        *,
        observe: Callable[[BatchRecord], None] | None = None,
    ) -> None:
        options = options or BatcherOptions()
        self.session = session
        self.options = options
        self._observe = observe
        self.max_rows = _most_rows(session, options)
        """The most rows of a batch; None if each request is a batch."""
        self._closed = False
        self._drops = False
        """Whether those that wait are not to be answered any more."""
        self._instances = options.instances or session.concurrency
        self._alone_s = 1.0
        """The approximate time of a request that runs alone."""
        self._forked()
        bind(self)

    def _forked(self) -> None:
        """Begin with an empty queue and no threads: those that were there belong to the parent."""
        self._queue = RequestQueue()
        self._condition = threading.Condition()
        self._running = 0
        self._threads: list[ServiceThread] = []

    def _start(self) -> None:
        for index in range(2 * self._instances):
            thread = ServiceThread(self._work, f"deploy batch {self.session.name} {index}")
            thread.start()
            self._threads.append(thread)

    # Requests.

    def submit(
        self, feed: Mapping[str, np.ndarray], *, priority: int = NORMAL_PRIORITY, timeout_s: float | None = None
    ) -> Future[Outputs]:
        """Queue a feed of numpy arrays, which must not change until the future is done.

        priority: 1 is the highest; requests of the same priority are served in order. timeout_s: a request that has not been
        taken by then fails with DeadlineError. Cancelling the future removes the request from the queue. Raises InputError for
        a feed that the session does not take or with more rows than a batch, QueueFullError, SessionClosedError.
        """
        future: RunFuture[Outputs] = RunFuture()

        def finish(outputs: Outputs | None, error: Exception | None) -> None:
            if error is not None:
                future.set_exception(error)
            else:
                assert outputs is not None
                future.set_result(outputs)

        request = self._request(feed, priority, timeout_s, future.set_running_or_notify_cancel, finish)
        self._put(request)
        future.add_done_callback(lambda done: self._discard(request) if done.cancelled() else None)
        return future

    def run(self, feed: Mapping[str, np.ndarray], *, priority: int = NORMAL_PRIORITY, timeout_s: float | None = None) -> Outputs:
        """`submit`, and wait for the outputs."""
        return self.submit(feed, priority=priority, timeout_s=timeout_s).result()

    async def run_async(
        self,
        feed: Mapping[str, np.ndarray],
        *,
        priority: int = NORMAL_PRIORITY,
        timeout_s: float | None = None,
        observe: Callable[[RequestTimes], None] | None = None,
    ) -> Outputs:
        """`run` for asyncio: other tasks go on meanwhile. If the task is cancelled, the request leaves the queue.

        observe: called with the times of the request once it has run, whether it succeeded or not.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Outputs] = loop.create_future()

        def settle(outputs: Outputs | None, error: Exception | None) -> None:
            if waiter.done():
                return  # cancelled in the meantime
            if error is not None:
                waiter.set_exception(error)
            else:
                assert outputs is not None
                waiter.set_result(outputs)

        def finish(outputs: Outputs | None, error: Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any longer
                loop.call_soon_threadsafe(settle, outputs, error)

        request = self._request(feed, priority, timeout_s, lambda: not waiter.cancelled(), finish)
        # Two thread switches take longer than a small model, so it runs here and blocks the loop no longer than they would.
        if self._alone_s <= INLINE_S and request.rows == 1 and self._enter():
            try:
                return self._run_here(request)
            finally:
                _observe_times(request, observe)
        self._put(request)
        try:
            return await waiter
        except asyncio.CancelledError:
            self._discard(request)
            raise
        finally:
            _observe_times(request, observe)

    def _enter(self) -> bool:
        """Take the session for a run in the caller's thread; False if anything runs or waits, or batches wait for more requests."""
        with self._condition:
            if self._running or self._queue or self._closed or self.options.delay_ms:
                return False
            self._running += 1
            return True

    def _run_here(self, request: Request) -> Outputs:
        try:
            done = run(self.session, [request], None)
        finally:
            self._leave()
        self._report(done, time.perf_counter())
        if done.outputs is None:
            assert done.error is not None
            raise ours(done.error, self.session.name)
        return done.outputs

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        with self._condition:
            return len(self._queue)

    def close(self, *, drain: bool = True) -> None:
        """Refuse new requests, and wait until those in the queue are answered; without `drain`, fail them with SessionClosedError."""
        self._shut(drain=drain)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _shut(self, *, drain: bool) -> None:
        with self._condition:
            self._closed = True
            self._drops = self._drops or not drain
            self._condition.notify_all()

    def _end(self) -> None:
        self._shut(drain=False)

    def _ended(self, deadline: float) -> None:
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _closed_error(self) -> SessionClosedError:
        leave_if_ending()
        return SessionClosedError(f"the batcher of {self.session.name!r} is closed")

    def _request(
        self,
        feed: Mapping[str, np.ndarray],
        priority: int,
        timeout_s: float | None,
        start: Callable[[], bool],
        finish: Callable[[Outputs | None, Exception | None], None],
    ) -> Request:
        if priority < 1:
            raise UsageError(f"`priority` must be 1 (the highest) or more, not {priority}")
        self.session.check(feed)
        if not all(isinstance(x, np.ndarray) for x in feed.values()):
            raise InputError("a batcher takes numpy arrays")
        if self.max_rows is None:
            rows, key = 1, None
        else:
            rows = len(feed[self.session.inputs[0].name])
            key = tuple([feed[spec.name].shape[1:] for spec in self.session.inputs])
            if rows > self.max_rows:
                raise InputError(f"{rows} rows in one request; a batch of {self.session.name!r} has {self.max_rows} at most")
        return Request(feed, rows=rows, key=key, priority=priority, timeout_s=timeout_s, start=start, finish=finish)

    def _put(self, request: Request) -> None:
        with self._condition:
            if self._closed:
                raise self._closed_error()
            if self._queue.rows + request.rows > self.options.queue_rows:
                raise QueueFullError(
                    f"the queue of {self.session.name!r} is full: {self._queue.rows} rows wait, {self.options.queue_rows} may;"
                    " try again later, or allow more (`queue_rows`)"
                )
            self._queue.put(request)
            if not self._threads:
                self._start()
            if self._running < self._instances:
                self._condition.notify()

    def _discard(self, request: Request) -> None:
        """Remove a cancelled request from the queue, if it is still there."""
        with self._condition:
            if request in self._queue:
                self._queue.remove(request)

    # Batches.

    def _work(self) -> None:
        joiner = Joiner(self.max_rows or 1)
        while (batch := self._take()) is not None:
            try:
                runs = execute(self.session, batch, joiner) if batch else []
            finally:
                self._leave()
            for done in runs:
                self._report(hand_out(done, self.session.name), time.perf_counter())

    def _take(self) -> list[Request] | None:
        """The next batch, once the session is free; empty if every request was cancelled or too late; None at the end."""
        with self._condition:
            while not self._due():
                if self._closed and not self._queue:
                    return None
                self._condition.wait(self._time_left())
            taken = self._queue.take_all() if self._drops else self._queue.take(self.max_rows)
            self._running += 1
            if self._queue and self._running < self._instances:
                self._condition.notify()
        now = time.perf_counter()
        batch = []
        for request in taken:
            if not request.start():
                continue
            if self._drops:
                request.finish(None, self._closed_error())
            elif request.deadline is not None and now > request.deadline:
                request.finish(None, DeadlineError(f"not begun within its {request.deadline - request.came:.3g} s"))
            else:
                batch.append(request)
        return batch

    def _leave(self) -> None:
        """The session is free for another batch."""
        with self._condition:
            self._running -= 1
            if self._closed:
                self._condition.notify_all()
            elif self._queue:
                self._condition.notify()

    def _due(self) -> bool:
        """Whether to take a batch now."""
        if self._drops:
            return bool(self._queue)
        if not self._queue or self._running >= self._instances:
            return False
        if not self.options.delay_ms or self.max_rows is None or self._closed:
            return True
        return self._queue.holds(self.max_rows) or (self._time_left() or 0) <= 0

    def _time_left(self) -> float | None:
        """The seconds that the first request may still wait for others; None if no request waits for others."""
        if not self._queue or self._running >= self._instances or not self.options.delay_ms:
            return None
        return self._queue.first.came + self.options.delay_ms / 1e3 - time.perf_counter()

    def _report(self, done: Done, end: float) -> None:
        batch = done.batch
        if len(batch) == 1 and done.error is None:
            # Times in a thread include waits for the interpreter, so the shortest ones count most.
            off = done.ran - done.joined - self._alone_s
            self._alone_s += off * (1.0 if off < 0 else 0.1 if done.here else 0.01)
        if self._observe is None:
            return
        record = BatchRecord(
            rows=sum(request.rows for request in batch),
            queue_s=[done.began - request.came for request in batch],
            total_s=[end - request.came for request in batch],
            input_s=done.joined - done.began,
            infer_s=done.ran - done.joined,
            output_s=end - done.ran,
            error=done.error,
        )
        try:
            self._observe(record)
        except Exception:  # a fault of the observer: the requests have their answers, and the batcher goes on
            logger.exception("what observes the batches of %r failed", self.session.name)


def _observe_times(request: Request, observe: Callable[[RequestTimes], None] | None) -> None:
    if observe is not None and request.times is not None:
        observe(request.times)


def _most_rows(session: Session, options: BatcherOptions) -> int | None:
    """The most rows of a batch; None if requests cannot be joined along their rows, or their results not taken apart."""
    if not rows_join(session.inputs, session.outputs):
        return None
    names = [spec.name for spec in session.inputs]
    allowed = max((profile[names[0]].max[0] for profile in session.profiles), default=None)
    wanted = options.max_rows or allowed or DEFAULT_ROWS
    if allowed is not None and wanted > allowed:
        raise UsageError(f"`max_rows` is {wanted}; the profiles of {session.name!r} take {allowed} rows at most")
    return min(wanted, options.queue_rows)
