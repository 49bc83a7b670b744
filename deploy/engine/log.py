"""TensorRT's messages: errors are kept, because they say why a call returned nothing; warnings go into the log.

They are records of the level DEBUG, which the command line does not show: one build of an INT8 engine may write a hundred
about its own steps ("Converting conv activation scales to fp32").
"""

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from deploy.engine.bindings import Bindings
from deploy.errors import BackendError

T = TypeVar("T")

logger = logging.getLogger("deploy.engine")

_lock = threading.Lock()
_holders = 0
_was_enabled = False


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Keep Python from collecting garbage, in any thread.

    Needed while a Builder or Runtime is made: TensorRT then holds a lock of the process and logs, in Python. A collection at that
    moment could free an older builder, for which TensorRT waits for the same lock, for ever.
    """
    global _holders, _was_enabled
    with _lock:
        if not _holders:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if not _holders and _was_enabled:
                gc.enable()


def start(kind: Callable[[Any], T], log: Any, library: str) -> T:
    """A Builder or Runtime, `kind`, with the logger `log`. library: its name and version, for the error.

    Raises BackendError where TensorRT cannot start, as on a machine whose driver is too old. Its bindings do not return None
    then: they raise TypeError ("factory function returned nullptr").
    """
    try:
        with garbage_kept():
            return kind(log)
    except TypeError as error:
        raise BackendError(f"{library} cannot start: {log.last()}") from error


def make_logger(trt: Bindings) -> Any:
    """An ILogger of the flavour whose module is `trt`.

    `last()` is the last error that TensorRT reported in this thread, or in any where it did in none, and that was not asked for.
    """

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._here = threading.local()  # of several threads whose runs fail, each gets its own reason
            self._anywhere = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._here.error = self._anywhere = message.strip()
            elif severity == trt.ILogger.WARNING:
                logger.debug("%s", message.strip())

        def last(self) -> str:
            found = getattr(self._here, "error", "") or self._anywhere
            self._here.error = self._anywhere = ""
            return found or "no reason was given"

    return Log()
