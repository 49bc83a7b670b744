"""Dynamic batching: requests of a few rows each become batches of a session, and every caller gets its own rows back.

    with Batcher(session, BatcherOptions(max_rows=16, delay_ms=2)) as batcher:
        outputs = batcher.run({"input": x})                    # waits
        future = batcher.submit({"input": x}, priority=1)      # concurrent.futures.Future
        outputs = await batcher.run_async({"input": x})        # asyncio; cancelling the task cancels the request

Only requests whose shapes are alike but for the rows go into one batch. Two threads serve each instance: while one is
in the session, the other hands out the last results; as soon as the session is free, it takes the next batch.
"""

import asyncio
import contextlib
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from deploy.errors import BackendError, DeadlineError, DeployError, InputError, QueueFullError, SessionClosedError, UsageError
from deploy.runtime.session import Session
from deploy.tensors import batch_dim

DEFAULT_ROWS = 32
"""Rows of a batch at most where neither the options nor a profile say."""

NORMAL_PRIORITY = 100

INLINE_S = 2e-4
"""A run that takes no longer is made in an event loop itself."""

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class BatcherOptions:
    """How to batch.

    max_rows: rows of a batch at most; None: the most that a profile of the session takes, else `DEFAULT_ROWS`. It is 1 request a
        batch, of any size, where the model has no symbolic batch dimension in all inputs and outputs.
    delay_ms: how long the first request of a batch waits for others. With 0 a batch is what waits when the session is free.
    queue_rows: rows that may wait; beyond, a request is refused.
    instances: batches in the session at a time; None: the session's `concurrency`.
    """

    max_rows: int | None = None
    delay_ms: float = 0.0
    queue_rows: int = 1024
    instances: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_rows", "queue_rows", "instances"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, not {value}")
        if not 0 <= self.delay_ms < 1e6:
            raise UsageError(f"delay_ms must be 0 or more, not {self.delay_ms:g}")


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """What became of one batch. queue_s: of each request, from its coming to its being taken. The other seconds are of the batch:
    putting the inputs together, the session's run, and taking the outputs apart. error: what failed all of them, if anything."""

    rows: int
    queue_s: Sequence[float]
    total_s: Sequence[float]
    input_s: float
    infer_s: float
    output_s: float
    error: Exception | None = None


class _Request:
    """One request in the queue. `finish` is called once, with the outputs or an error, from a thread of the batcher."""

    __slots__ = ("came", "deadline", "feed", "finish", "key", "number", "priority", "rows", "start")

    def __init__(
        self,
        feed: Mapping[str, np.ndarray],
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
        self.number = 0


class Batcher:
    """Batches of a session, which stays the caller's to close. Safe to use from many threads and event loops at once.

    observe: is told of every batch, from the batcher's own threads.
    """

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
        self._names = tuple(spec.name for spec in session.inputs)
        self.max_rows = _most_rows(session, options)
        """Rows of a batch at most; None where each request goes alone."""
        self._queues: dict[int, OrderedDict[int, _Request]] = {}
        self._numbers = itertools.count()
        self._waiting_rows = 0
        self._condition = threading.Condition()
        self._closed = False
        self._instances = options.instances or session.concurrency
        self._running = 0
        self._alone_s = 1.0
        """About what a request takes that is run alone."""
        self._threads = [
            threading.Thread(target=self._work, name=f"deploy batch {session.name} {index}", daemon=True)
            for index in range(2 * self._instances)
        ]
        for thread in self._threads:
            thread.start()

    # Requests.

    def submit(
        self, feed: Mapping[str, np.ndarray], *, priority: int = NORMAL_PRIORITY, timeout_s: float | None = None
    ) -> Future[Outputs]:
        """Queue a feed of numpy arrays, which must stay as they are until the future is done.

        priority: 1 is the highest; requests of one priority are served in their order. timeout_s: a request that was not
        taken by then fails with DeadlineError. Cancelling the future takes the request out of the queue. Raises InputError for
        a feed that the session does not take or with more rows than a batch, QueueFullError, SessionClosedError.
        """
        future: Future[Outputs] = Future()

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
        self, feed: Mapping[str, np.ndarray], *, priority: int = NORMAL_PRIORITY, timeout_s: float | None = None
    ) -> Outputs:
        """`run` for asyncio: other tasks go on meanwhile. Where the task is cancelled, the request leaves the queue."""
        # Two changes of threads take longer than a small model: it is run here then, and holds the loop up for no longer.
        if self._alone_s <= INLINE_S:
            small = self._request(feed, priority, timeout_s, _always, _nothing)
            if small.rows == 1 and self._enter():
                return self._run_here(small)
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
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any longer
                loop.call_soon_threadsafe(settle, outputs, error)

        request = self._request(feed, priority, timeout_s, lambda: not waiter.cancelled(), finish)
        self._put(request)
        try:
            return await waiter
        except asyncio.CancelledError:
            self._discard(request)
            raise

    def _enter(self) -> bool:
        """Take the session for a run in the caller's thread, if nothing runs or waits and nothing is waited for."""
        with self._condition:
            if self._running or self._queues or self._closed or self.options.delay_ms:
                return False
            self._running += 1
            return True

    def _run_here(self, request: _Request) -> Outputs:
        try:
            done = self._run([request], {})
        finally:
            self._leave()
        self._report(done, time.perf_counter())
        if done.outputs is None:
            assert done.error is not None
            raise _ours(done.error, self.session.name)
        return done.outputs

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        with self._condition:
            return sum(map(len, self._queues.values()))

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, and wait until those queued are answered, or without `drain` fail them with SessionClosedError."""
        with self._condition:
            self._closed = True
            left = [] if drain else [request for queue in self._queues.values() for request in queue.values()]
            for request in left:
                self._remove(request)
            self._condition.notify_all()
        for request in left:
            if request.start():
                request.finish(None, self._closed_error())
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _closed_error(self) -> SessionClosedError:
        return SessionClosedError(f"the batcher of {self.session.name!r} is closed")

    def _request(
        self,
        feed: Mapping[str, np.ndarray],
        priority: int,
        timeout_s: float | None,
        start: Callable[[], bool],
        finish: Callable[[Outputs | None, Exception | None], None],
    ) -> _Request:
        if priority < 1:
            raise UsageError(f"priority must be 1 (the highest) or more, not {priority}")
        self.session.check(feed)
        if not all(isinstance(x, np.ndarray) for x in feed.values()):
            raise InputError("a batcher takes numpy arrays")
        if self.max_rows is None:
            rows, key = 1, None
        else:
            rows = len(feed[self._names[0]])
            key = tuple([feed[name].shape[1:] for name in self._names])
            if rows > self.max_rows:
                raise InputError(f"{rows} rows in one request; a batch of {self.session.name!r} has {self.max_rows} at most")
        deadline = None if timeout_s is None else time.perf_counter() + timeout_s
        return _Request(feed, rows, key, priority, deadline, start, finish)

    def _put(self, request: _Request) -> None:
        with self._condition:
            if self._closed:
                raise self._closed_error()
            if self._waiting_rows + request.rows > self.options.queue_rows:
                raise QueueFullError(
                    f"the queue of {self.session.name!r} is full: {self._waiting_rows} rows wait, {self.options.queue_rows} may"
                )
            request.number = next(self._numbers)
            queue = self._queues.get(request.priority)
            if queue is None:
                queue = self._queues[request.priority] = OrderedDict()
                self._queues = dict(sorted(self._queues.items()))
            queue[request.number] = request
            self._waiting_rows += request.rows
            if self._running < self._instances:
                self._condition.notify()

    def _discard(self, request: _Request) -> None:
        """Take a cancelled request out of the queue, if it is still there."""
        with self._condition:
            if request.number in self._queues.get(request.priority, ()):
                self._remove(request)

    def _remove(self, request: _Request) -> None:
        queue = self._queues[request.priority]
        del queue[request.number]
        self._waiting_rows -= request.rows
        if not queue:
            del self._queues[request.priority]

    # Batches.

    def _work(self) -> None:
        staging: dict[tuple[Any, ...], np.ndarray] = {}
        while (batch := self._take()) is not None:
            try:
                done = self._execute(batch, staging) if batch else []
            finally:
                self._leave()
            for each in done:
                self._hand_out(each)

    def _take(self) -> list[_Request] | None:
        """The next batch, once the session is free; an empty one where all of it was cancelled or too late; None at the end."""
        with self._condition:
            while not self._due():
                if self._closed and not self._queues:
                    return None
                self._condition.wait(self._time_left())
            taken = self._gather(self._first())
            for request in taken:
                self._remove(request)
            self._running += 1
            if self._queues and self._running < self._instances:
                self._condition.notify()
        now = time.perf_counter()
        batch = []
        for request in taken:
            if not request.start():
                continue
            if request.deadline is not None and now > request.deadline:
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
            elif self._queues:
                self._condition.notify()

    def _due(self) -> bool:
        """Whether a batch is to be taken now."""
        if not self._queues or self._running >= self._instances:
            return False
        if not self.options.delay_ms or self.max_rows is None or self._closed:
            return True
        return self._rows_like(self._first()) >= self.max_rows or (self._time_left() or 0) <= 0

    def _time_left(self) -> float | None:
        """Seconds that the first request may still wait for others; None where nothing waits, or not for that."""
        if not self._queues or self._running >= self._instances or not self.options.delay_ms:
            return None
        return self._first().came + self.options.delay_ms / 1e3 - time.perf_counter()

    def _first(self) -> _Request:
        return next(iter(next(iter(self._queues.values())).values()))

    def _all(self) -> Iterable[_Request]:
        return itertools.chain.from_iterable(queue.values() for queue in self._queues.values())

    def _rows_like(self, first: _Request) -> int:
        """Rows that wait and could go with `first`, as far as they go into one batch."""
        assert self.max_rows is not None
        rows = 0
        for request in self._all():
            if request.key == first.key:
                rows += request.rows
                if rows >= self.max_rows:
                    break
        return rows

    def _gather(self, first: _Request) -> list[_Request]:
        """`first` and what fits into a batch with it, in order; it stops at the first of its shape that does not fit."""
        if self.max_rows is None:
            return [first]
        taken = []
        rows = 0
        for request in self._all():
            if request.key != first.key:
                continue
            if rows + request.rows > self.max_rows:
                break
            taken.append(request)
            rows += request.rows
            if rows == self.max_rows:
                break
        return taken

    def _execute(self, batch: Sequence[_Request], staging: dict[tuple[Any, ...], np.ndarray]) -> "list[_Done]":
        """Run the batch; where it fails, each request alone, for one of them may be to blame."""
        done = self._run(batch, staging)
        if done.error is None or len(batch) == 1:
            return [done]
        return [self._run([request], staging) for request in batch]

    def _run(self, batch: Sequence[_Request], staging: dict[tuple[Any, ...], np.ndarray]) -> "_Done":
        began = joined = time.perf_counter()
        outputs: Outputs | None = None
        error: Exception | None = None
        try:
            feed = batch[0].feed if len(batch) == 1 else self._join(batch, staging)
            joined = time.perf_counter()
            outputs = self.session.run(feed)
        except Exception as caught:
            error = caught
        return _Done(batch=batch, outputs=outputs, error=error, began=began, joined=joined, ran=time.perf_counter())

    def _join(self, batch: Sequence[_Request], staging: dict[tuple[Any, ...], np.ndarray]) -> dict[str, np.ndarray]:
        """One feed of all, in memory that is used again."""
        assert self.max_rows is not None
        rows = sum(request.rows for request in batch)
        feed = {}
        for name in self._names:
            first = batch[0].feed[name]
            key = (name, first.shape[1:])
            whole = staging.get(key)
            if whole is None:
                if len(staging) >= 4 * len(self._names):
                    staging.clear()  # of shapes that come once there may be any number
                whole = staging[key] = np.empty((self.max_rows, *first.shape[1:]), dtype=first.dtype)
            feed[name] = np.concatenate([request.feed[name] for request in batch], out=whole[:rows])
        return feed

    def _hand_out(self, done: "_Done") -> None:
        batch, outputs = done.batch, done.outputs
        if outputs is None:
            assert done.error is not None
            batch[0].finish(None, _ours(done.error, self.session.name))
        elif len(batch) == 1:
            batch[0].finish(outputs, None)
        else:
            at = 0
            for request in batch:
                # Copies: a caller that keeps its rows must not keep those of all others, nor see them.
                own = {name: array[at : at + request.rows].copy() for name, array in outputs.items()}
                at += request.rows
                request.finish(own, None)
        self._report(done, time.perf_counter())

    def _report(self, done: "_Done", end: float) -> None:
        batch = done.batch
        if len(batch) == 1 and done.error is None:
            self._alone_s += 0.1 * (done.ran - done.joined - self._alone_s)
        if self._observe is not None:
            self._observe(
                BatchRecord(
                    rows=sum(request.rows for request in batch),
                    queue_s=[done.began - request.came for request in batch],
                    total_s=[end - request.came for request in batch],
                    input_s=done.joined - done.began,
                    infer_s=done.ran - done.joined,
                    output_s=end - done.ran,
                    error=done.error,
                )
            )


@dataclass(frozen=True, kw_only=True)
class _Done:
    """A batch that was run: its outputs or the error, and when it was begun, put together and run."""

    batch: Sequence[_Request]
    outputs: Outputs | None
    error: Exception | None
    began: float
    joined: float
    ran: float


def _always() -> bool:
    return True


def _nothing(outputs: Outputs | None, error: Exception | None) -> None:
    pass


def _ours(error: Exception, name: str) -> Exception:
    if isinstance(error, DeployError):
        return error
    wrapped = BackendError(f"running {name!r} failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _most_rows(session: Session, options: BatcherOptions) -> int | None:
    """Rows of a batch; None where rows of requests cannot be put together, or their results not be taken apart."""
    batch = batch_dim(session.inputs)
    if batch is None or any(not spec.shape or spec.shape[0] != batch for spec in (*session.inputs, *session.outputs)):
        return None
    names = [spec.name for spec in session.inputs]
    allowed = max((profile[names[0]].max[0] for profile in session.profiles), default=None)
    wanted = options.max_rows or allowed or DEFAULT_ROWS
    if allowed is not None and wanted > allowed:
        raise UsageError(f"max_rows is {wanted}; the profiles of {session.name!r} take {allowed} rows at most")
    return min(wanted, options.queue_rows)


class Pipeline:
    """What comes before and after a batcher, in threads of its own, so that all three overlap.

    before: makes a feed of an item. after: makes a result of the outputs. Either may raise, which fails its item alone.
    """

    def __init__(
        self,
        batcher: Batcher,
        before: Callable[[Any], Mapping[str, np.ndarray]],
        after: Callable[[Outputs], Any],
        *,
        workers: int = 2,
    ) -> None:
        if workers < 1:
            raise UsageError(f"workers must be 1 or more, not {workers}")
        self.batcher = batcher
        self._before = before
        self._after = after
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"deploy pipeline {batcher.session.name}")

    def submit(self, item: Any, *, priority: int = NORMAL_PRIORITY, timeout_s: float | None = None) -> Future[Any]:
        """The result of one item. Errors of all steps come with the future."""
        result: Future[Any] = Future()
        result.set_running_or_notify_cancel()

        def fail(error: BaseException) -> None:
            result.set_exception(error)

        def begin() -> None:
            try:
                inner = self.batcher.submit(self._before(item), priority=priority, timeout_s=timeout_s)
            except Exception as error:
                fail(error)
            else:
                inner.add_done_callback(hand_on)

        def hand_on(inner: Future[Outputs]) -> None:
            try:
                self._pool.submit(end, inner)
            except RuntimeError:  # the pool is closed: here, then
                end(inner)

        def end(inner: Future[Outputs]) -> None:
            try:
                result.set_result(self._after(inner.result()))
            except Exception as error:
                fail(error)

        try:
            self._pool.submit(begin)
        except RuntimeError:
            raise SessionClosedError(f"the pipeline of {self.batcher.session.name!r} is closed") from None
        return result

    async def run_async(self, item: Any, *, priority: int = NORMAL_PRIORITY, timeout_s: float | None = None) -> Any:
        """`submit` for asyncio. Where the task is cancelled, the request leaves the batcher's queue."""
        loop = asyncio.get_running_loop()
        feed = await loop.run_in_executor(self._pool, self._before, item)
        outputs = await self.batcher.run_async(feed, priority=priority, timeout_s=timeout_s)
        return await loop.run_in_executor(self._pool, self._after, outputs)

    def close(self) -> None:
        """Wait for what was submitted to its first step; the batcher stays the caller's to close, after this."""
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
