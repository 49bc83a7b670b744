"""The process around a session: what a fork and the end of the program mean for it, for batchers and for pipelines.

A fork copies one thread: locks that other threads held stay locked in the child, and pools there have no threads. So a fork waits
for the runs under way and holds back new ones; in the child, whatever was made before starts anew at its next use. At the end of the
program nothing new begins, and the runs under way are waited for: a thread that comes back from a library while Python shuts down is
ended in the middle of C++, which aborts the process.
"""

import atexit
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NoReturn
from weakref import WeakValueDictionary

logger = logging.getLogger("deploy.runtime")

LIMIT_S = 30.0
"""How long a fork and the end of the program wait for the runs under way, in seconds."""

_STEP_S = 0.0005

gate = threading.Lock()
"""Held while it changes whether a session may run."""

on_cpu: list[int] = []
on_gpu: list[int] = []
"""The identifiers of the threads that are in runs, once for each. Appending and removing are atomic.

A fork does not wait for runs on a GPU: the child can do nothing with them anyway, and they wait for one another.
"""

_forks = 0
_aside = False
"""Whether the last fork came from another thread than the main one."""
_over = threading.Event()  # set where no fork is under way
_over.set()
_ender: int | None = None


class ProcessBound:
    """What belongs to the process that made it: it cannot be copied or pickled, and hears of forks and of the end of the program."""

    _instead: ClassVar[str]
    """What to do instead of copying or pickling one: the message of the error."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:  # what copy, pickle and all that builds on them call
        raise TypeError(self._instead)

    def _hold(self) -> None:
        """Begin no run: a fork is about to come. Called while `gate` is held."""

    def _resume(self) -> None:
        """The fork is over, and this is the parent. Called while `gate` is held."""

    def _forked(self) -> None:
        """This is the child, whose only thread is the caller's: drop what the other threads would have done, and may have locked."""

    def _end(self) -> None:
        """The program ends: begin nothing more."""

    def _ended(self, deadline: float) -> None:
        """No run is under way any longer: release what is held, until `deadline` on the monotonic clock at most."""


class ServiceThread(threading.Thread):
    """A thread of a session, batcher or pipeline. It does not keep the program from ending."""

    def __init__(self, target: Callable[..., None], name: str, *args: Any) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)


_bound: WeakValueDictionary[int, ProcessBound] = WeakValueDictionary()


def bind(thing: ProcessBound) -> None:
    """Tell `thing` of forks and of the end of the program, as long as it lives."""
    _bound[id(thing)] = thing


def forking() -> bool:
    return _forks > 0


def wait_for_forks() -> None:
    """Wait until no fork is under way."""
    _over.wait()


def leave_if_ending() -> None:
    """At the end of the program, end the caller's thread without a word, if it is a daemon thread of the program's own.

    An error would be printed where there is nothing wrong, and be caught where it is tried again for ever.
    """
    if _ender not in (None, threading.get_ident()) and not isinstance(threading.current_thread(), ServiceThread):
        raise SystemExit


def keep_for_ever(thing: object) -> None:
    """Never destroy `thing`, not even at the end: in a child, a library would wait for threads that are the parent's alone."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _things() -> list[ProcessBound]:
    """All that is bound, the newest first: a batcher before its session."""
    alive = (reference() for reference in reversed(_bound.valuerefs()))
    return [thing for thing in alive if thing is not None]


def _wait(*under_way: list[int]) -> bool:
    """Wait until no other thread is in a run; False if that takes longer than `LIMIT_S`."""
    deadline, thread = time.monotonic() + LIMIT_S, threading.get_ident()
    while any(other != thread for runs in under_way for other in tuple(runs)):
        if time.monotonic() > deadline:
            return False
        time.sleep(_STEP_S)
    return True


def _before_fork() -> None:
    global _forks, _aside
    _aside = threading.current_thread() is not threading.main_thread()
    with gate:
        _forks += 1
        _over.clear()
        for thing in _things():
            thing._hold()
    if not _wait(on_cpu):
        logger.warning("the process is forked while a run goes on that takes longer than %g s: the child may hang", LIMIT_S)


def _after_fork_in_parent() -> None:
    global _forks
    with gate:
        _forks -= 1
        if not _forks:
            for thing in _things():
                thing._resume()
            _over.set()


def _after_fork_in_child() -> None:
    global gate, _forks, _over
    thread = threading.get_ident()
    for runs in (on_cpu, on_gpu):
        runs[:] = [other for other in runs if other == thread]  # the caller's, if it forks in the middle of a run
    gate, _forks, _over = threading.Lock(), 0, threading.Event()
    _over.set()
    things = _things()
    for thing in things:
        thing._forked()
    if _aside and things:
        ServiceThread(_end_with, "deploy end", threading.current_thread()).start()


def _end_with(thread: threading.Thread) -> None:
    """End the process when this thread, and those of the program, have ended.

    A child that was forked beside the main thread ends with its last thread, and not by an end of the program: those of a library would
    keep it for ever. Its status is 0 then, as without them.
    """
    own = threading.current_thread()
    thread.join()
    while left := [each for each in threading.enumerate() if each is not own and not each.daemon and each.is_alive()]:
        left[0].join()
    os._exit(0)


def _at_exit() -> None:
    global _ender
    _ender = threading.get_ident()
    deadline = time.monotonic() + LIMIT_S
    things = _things()
    for thing in things:
        _report_errors(thing._end)
    if not _wait(on_cpu, on_gpu):
        logger.warning("the program ends while a run goes on that takes longer than %g s", LIMIT_S)
        return
    for thing in things:
        _report_errors(partial(thing._ended, deadline))


def _report_errors(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:  # the others must be ended too
        logger.exception("ending a session failed")


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
