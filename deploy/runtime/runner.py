"""What a session does about forks, the end of the program, and its own: it decides whether a run may begin."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from deploy.errors import BackendError, SessionClosedError
from deploy.runtime import lifetime
from deploy.runtime.lifetime import ProcessBound


class Runner(ProcessBound):
    """What runs a model with a library.

    A run puts its thread into `_under_way`, and calls `_admit` if it is barred; other uses of the library are `with self._working()`.
    """

    name: str

    def __init__(self, device: str) -> None:
        self.device = device
        self._under_way = lifetime.on_cpu if device == "cpu" else lifetime.on_gpu
        self._closed = False
        self._stale = False  # opened in the parent of this process, and not revived here
        self._barred = False  # closed, stale, or a fork is under way
        self._ends = False
        self._state_lock = threading.Lock()

    def _stop(self) -> None:
        """Wake what would wait for ever. Called once, before `close` waits for the runs under way."""

    def _release(self) -> None:
        """Release what the library holds. Called once; runs that have begun may still be under way."""

    def _revive(self) -> None:
        """Start anew what does not survive a fork. Called in the child, before the first run there. Raises BackendError."""
        if self.device != "cpu":
            raise BackendError(
                f"{self.name!r} was loaded on {self.device} before the process was forked, and CUDA does not survive a fork: call"
                " deploy.load() in the child (multiprocessing: the start method spawn; gunicorn: without --preload)"
            )

    def _admit(self) -> None:
        """Wait for the end of a fork, and revive what did not survive one. Called in a run that is barred; raises what `run` does."""
        thread = threading.get_ident()
        nested = self._under_way.count(thread) > 1  # in a run whose end the fork waits for
        while self._barred:
            if self._closed:
                raise closed_error(self.name)
            if not nested:
                self._under_way.remove(thread)
                try:
                    lifetime.wait_for_forks()
                finally:
                    self._under_way.append(thread)
            with self._state_lock:
                if self._stale and not self._closed:
                    self._revive()
                    self._stale = False
            if nested:
                return
            with lifetime.gate:
                self._barred = self._closed or lifetime.forking()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Use the library in another way than by `run`. Raises what `run` does."""
        thread = threading.get_ident()
        self._under_way.append(thread)
        try:
            if self._barred:
                self._admit()
            yield
        finally:
            self._under_way.remove(thread)

    def _shut(self) -> bool:
        """Refuse further runs, and wake what waits. False if that was done before."""
        with self._state_lock:
            if self._closed:
                return False
            with lifetime.gate:
                self._closed = self._barred = True
        if not self._stale:
            self._stop()
        return True

    def _hold(self) -> None:
        self._barred = True

    def _resume(self) -> None:
        self._barred = self._closed or self._stale

    def _forked(self) -> None:
        lifetime.keep_for_ever(dict(self.__dict__))
        self._state_lock = threading.Lock()
        self._stale = self._barred = True

    def _end(self) -> None:
        self._ends = self._shut()

    def _ended(self, deadline: float) -> None:
        if self._ends and not self._stale:
            self._release()


def closed_error(name: str) -> SessionClosedError:
    """What to raise of a closed session called `name`; at the end of the program, a thread of the program's own ends here instead."""
    lifetime.leave_if_ending()
    return SessionClosedError(f"the session on {name!r} is closed")
