"""Steps before and after a batcher, which overlap with it."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import numpy as np

from deploy.errors import SessionClosedError, UsageError
from deploy.runtime.batching.batcher import Batcher
from deploy.runtime.batching.queue import NORMAL_PRIORITY, Outputs
from deploy.runtime.lifetime import ProcessBound, bind, leave_if_ending
from deploy.runtime.tasks import RunFuture, TaskPool


class Pipeline(ProcessBound):
    """A batcher with a step before and a step after it, which run in separate threads so that all three overlap.

    before: turns an item into a feed. after: turns outputs into a result. If one raises, only its item fails.
    """

    _instead = "a pipeline cannot be pickled or copied: make one in the process that uses it, of a session that is loaded there"

    def __init__(
        self,
        batcher: Batcher,
        before: Callable[[Any], Mapping[str, np.ndarray]],
        after: Callable[[Outputs], Any],
        *,
        workers: int = 2,
    ) -> None:
        if workers < 1:
            raise UsageError(f"`workers` must be 1 or more, not {workers}")
        self.batcher = batcher
        self._before = before
        self._after = after
        self._pool = TaskPool(workers, f"deploy pipeline {batcher.session.name}")
        self._ending = False
        bind(self)

    def submit(self, item: Any, *, priority: int = NORMAL_PRIORITY, timeout_s: float | None = None) -> Future[Any]:
        """Process one item. The future has the result, or the error of any step."""
        result: RunFuture[Any] = RunFuture()
        result.set_running_or_notify_cancel()

        def fail(error: BaseException) -> None:
            result.set_exception(error)

        def begin() -> None:
            try:
                self._check_open()
                inner = self.batcher.submit(self._before(item), priority=priority, timeout_s=timeout_s)
            except Exception as error:
                fail(error)
            else:
                inner.add_done_callback(hand_on)

        def hand_on(inner: Future[Outputs]) -> None:
            try:
                self._check_open()
                self._pool.submit(end, inner)
            except (RuntimeError, SessionClosedError):  # the pool is closed, or the program ends: here, then
                end(inner)

        def end(inner: Future[Outputs]) -> None:
            try:
                self._check_open()
                result.set_result(self._after(inner.result()))
            except Exception as error:
                fail(error)

        try:
            self._pool.submit(begin)
        except RuntimeError:
            raise self._closed_error() from None
        return result

    def _check_open(self) -> None:
        if self._ending:
            raise self._closed_error()

    def _closed_error(self) -> SessionClosedError:
        leave_if_ending()
        return SessionClosedError(f"the pipeline of {self.batcher.session.name!r} is closed")

    def _end(self) -> None:
        self._ending = True

    async def run_async(self, item: Any, *, priority: int = NORMAL_PRIORITY, timeout_s: float | None = None) -> Any:
        """`submit` for asyncio. If the task is cancelled, the request leaves the batcher's queue."""
        loop = asyncio.get_running_loop()
        feed = await loop.run_in_executor(self._pool, self._before, item)
        outputs = await self.batcher.run_async(feed, priority=priority, timeout_s=timeout_s)
        return await loop.run_in_executor(self._pool, self._after, outputs)

    def close(self) -> None:
        """Wait until the first step of every item is done. The caller closes the batcher afterwards."""
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
