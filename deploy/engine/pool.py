"""The execution contexts of one engine, which concurrent runs share."""

import threading
from collections.abc import Callable

from deploy.engine.context import EngineContext


class ContextPool:
    """At most `most` contexts, each made when it is first needed. Safe to use from many threads at once.

    A run borrows a context and gives it back. A stream parks the contexts whose runs it has begun, and resumes them when their
    outputs are read; `stop` takes parked contexts away, because nobody may ever come back for them.

    made: all contexts, free or not. make: makes one more. closed: makes the error to raise after `stop`.
    """

    def __init__(self, make: Callable[[], EngineContext], most: int, closed: Callable[[], Exception]) -> None:
        self.made: list[EngineContext] = []
        self._make = make
        self._most = most
        self._closed_error = closed
        self._idle: list[EngineContext] = []
        self._parked: set[EngineContext] = set()
        self._free = threading.Condition()
        self._waiting = 0
        self._stopped = False

    def borrow(self) -> EngineContext:
        """A free context; waits for one if `most` are in use."""
        context = self._borrow(wait=True)
        assert context is not None
        return context

    def borrow_free(self) -> EngineContext | None:
        """A free context; None if `most` are in use."""
        return self._borrow(wait=False)

    def _borrow(self, *, wait: bool) -> EngineContext | None:
        try:
            return self._idle.pop()  # atomic, and usually all that is needed
        except IndexError:
            pass
        with self._free:
            self._waiting += 1  # from now on give_back takes the lock, so that this thread misses nothing
            try:
                while not self._idle:
                    if self._stopped:
                        raise self._closed_error()
                    if len(self.made) < self._most:
                        context = self._make()
                        self.made.append(context)
                        return context
                    if not wait:
                        return None
                    self._free.wait()
                return self._idle.pop()
            finally:
                self._waiting -= 1

    def give_back(self, context: EngineContext) -> None:
        """Return a borrowed context."""
        self._idle.append(context)
        if self._waiting:
            with self._free:
                self._free.notify()

    def park(self, context: EngineContext) -> None:
        """Keep a borrowed context, whose run has begun, until `resume`. After `stop` it is given back, and this raises."""
        with self._free:
            if not self._stopped:
                self._parked.add(context)
                return
        context.settle()
        self.give_back(context)
        raise self._closed_error()

    def resume(self, context: EngineContext) -> bool:
        """Borrow a parked context again; False if `stop` has taken it away."""
        with self._free:
            if context not in self._parked:
                return False
            self._parked.remove(context)
            return True

    def stop(self) -> None:
        """Take parked contexts away and make no more. Whoever waits for a context gets one of those, or the error."""
        with self._free:
            self._stopped = True
            for context in self._parked:
                context.settle()
            self._idle += self._parked
            self._parked.clear()
            self._free.notify_all()

    def close(self) -> None:
        """After `stop`: wait until all contexts have been given back, and close them."""
        with self._free:
            self._waiting += 1
            left = len(self.made)
            while left:
                try:
                    context = self._idle.pop()  # nobody else can take it now
                except IndexError:
                    self._free.wait()
                    continue
                context.close()
                left -= 1
            self.made.clear()
            self._free.notify_all()
