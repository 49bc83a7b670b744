"""Threads that work off a queue, and the futures of what they do. Unlike those of `concurrent.futures`, they survive a fork, and
the end of the program does not wait until the queue is empty."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakSet

from deploy.errors import SessionClosedError, SessionError
from deploy.runtime.lifetime import ProcessBound, ServiceThread, bind, leave_if_ending

P = ParamSpec("P")
T = TypeVar("T")


class RunFuture(ProcessBound, Future[T]):
    """The future of a run. Where a process is forked before it is done, it fails in the child: the answer comes in the parent."""

    _instead = "a future cannot be pickled or copied: its answer comes in the process that asked; wait for result() and send that"

    def __init__(self) -> None:
        super().__init__()
        _futures.add(self)

    def result(self, timeout: float | None = None) -> T:
        try:
            return super().result(timeout)
        except SessionClosedError:
            leave_if_ending()
            raise

    def _forked(self) -> None:
        self._condition = threading.Condition()  # another thread may have held it
        if not self.done():
            super().__init__()  # without callbacks, which are the parent's
            self.set_exception(SessionError("the process was forked before this was answered: ask again in the child"))


_futures: WeakSet[RunFuture[Any]] = WeakSet()


def _after_fork_in_child() -> None:
    for future in list(_futures):
        future._forked()


os.register_at_fork(after_in_child=_after_fork_in_child)

Task = tuple[RunFuture[Any], Callable[[], Any]]


class TaskPool(ProcessBound, Executor):
    """`workers` threads, called `name`, that do what is submitted, in order. They are started at the first task."""

    _instead = "threads cannot be pickled or copied"

    def __init__(self, workers: int, name: str) -> None:
        self._workers = workers
        self._name = name
        self._closed = False
        self._forked()
        bind(self)

    def _forked(self) -> None:
        self._lock = threading.Lock()
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._threads: list[ServiceThread] = []

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call. Raises RuntimeError after `shutdown`."""
        future: RunFuture[T] = RunFuture()
        with self._lock:
            if self._closed:
                raise RuntimeError("submitted after shutdown")
            self._tasks.put((future, lambda: fn(*args, **kwargs)))
            while len(self._threads) < self._workers:
                thread = ServiceThread(_work, self._name, self._tasks)
                thread.start()
                self._threads.append(thread)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._closed = True
            if cancel_futures:
                self._cancel()
            self._dismiss()
        if wait:
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()

    def _cancel(self) -> None:
        with contextlib.suppress(Empty):
            while task := self._tasks.get_nowait():
                task[0].cancel()

    def _dismiss(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)

    def _ended(self, deadline: float) -> None:
        self.shutdown(wait=False)
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def __del__(self) -> None:
        self._dismiss()  # nobody can submit any more, nor wait for them


def _work(tasks: "SimpleQueue[Task | None]") -> None:
    """Do tasks until there comes None."""
    while (task := tasks.get()) is not None:
        future, call = task
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(cast(Any, result))
                del result
        del task, future, call  # kept while this waits for the next, they would hold their arrays
