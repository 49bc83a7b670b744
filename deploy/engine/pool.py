"""The execution contexts of one engine, which concurrent runs share."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from deploy.engine.context import EngineContext, Shape
from deploy.engine.cuda import DeviceLostError, DeviceMemoryError
from deploy.errors import BackendError

logger = logging.getLogger("deploy.runtime")


class ContextPool:
    """At most `most` contexts, each made when it is first needed. Safe to use from many threads at once.

    A run borrows a context and gives it back. A stream parks the contexts whose runs it has begun, and resumes them when their
    outputs are read; `stop` takes parked contexts away, because nobody may ever come back for them. Where there is no room for
    one more, those that exist are shared. Once a context has lost the GPU, nobody gets any: DeviceLostError.

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
        self._making = 0
        self._stopped = False
        self._lost: DeviceLostError | None = None

    def borrow(self, shapes: tuple[Shape, ...] | None = None) -> EngineContext:
        """A free context; waits for one if `most` are in use.

        shapes: of a run that replays a graph. The context that ran them last has it still; or it is the one unused for longest, so
        that the graphs of the others live.
        """
        context = self._borrow(shapes, wait=True)
        assert context is not None
        return context

    def borrow_free(self) -> EngineContext | None:
        """A free context; None if `most` are in use."""
        return self._borrow(None, wait=False)

    def fill(self) -> None:
        """Make all contexts now. Raises DeviceMemoryError if there is no room for them."""
        while True:
            with self._free:
                if self._stopped:
                    raise self._closed_error()
                if len(self.made) + self._making >= self._most:
                    return
                self._making += 1
            self.give_back(self._made())

    def _borrow(self, shapes: tuple[Shape, ...] | None, *, wait: bool) -> EngineContext | None:
        while True:
            if self._lost is not None:
                raise DeviceLostError(self._lost.reason)
            try:
                return self._idle.pop() if shapes is None else self._pop(shapes)  # atomic, and usually all that is needed
            except IndexError:
                pass
            with self._free:
                self._waiting += 1  # from now on give_back takes the lock, so that this thread misses nothing
                try:
                    while not self._idle and self._lost is None:
                        if self._stopped:
                            raise self._closed_error()
                        if len(self.made) + self._making < self._most:
                            self._making += 1
                            break
                        if not wait:
                            return None
                        self._free.wait()
                    else:
                        continue
                finally:
                    self._waiting -= 1
            try:
                return self._made()
            except DeviceMemoryError as error:
                with self._free:
                    if not self.made:
                        raise
                    self._most = len(self.made)
                logger.warning("no room for one more execution context: %s; %d will be shared", error, len(self.made))

    def _pop(self, shapes: tuple[Shape, ...]) -> EngineContext:
        for context in reversed(tuple(self._idle)):
            if context.shapes == shapes:
                with suppress(ValueError):  # another thread was quicker
                    self._idle.remove(context)
                    return context
        return self._idle.pop(0)

    def _made(self) -> EngineContext:
        """One more, made outside the lock: it takes long, and may fail while another is given back. `_making` counts it already."""
        try:
            context = self._make()
        except BaseException:
            with self._free:
                self._making -= 1
                self._free.notify_all()
            raise
        with self._free:
            self._making -= 1
            self.made.append(context)
        return context

    def give_back(self, context: EngineContext) -> None:
        """Return a borrowed context."""
        if context.lost is not None:
            self._lost = context.lost
        self._idle.append(context)
        if self._waiting:
            with self._free:
                self._free.notify_all()

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

    def close(self, *, wait: bool = True) -> None:
        """After `stop`: wait until all contexts have been given back, and close all, whatever happens to one of them.

        wait: without it, those in use are left alone. Raises the first BackendError that closing one of them did.
        """
        failed: BackendError | None = None
        with self._free:
            self._waiting += 1
            while self.made or self._making:
                try:
                    context = self._idle.pop()  # nobody else can take it now
                except IndexError:
                    if not wait:
                        break
                    self._free.wait()
                    continue
                self.made.remove(context)
                try:
                    context.close()
                except BackendError as error:
                    failed = failed or error
            self._free.notify_all()
        if failed is not None:
            raise failed
