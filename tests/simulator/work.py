"""Streams, events and the work on them. Clocks say what is known to be over before what; the work itself is done late.

A clock maps each stream to the number of its pieces of work that are known to be over. The host is one actor: between threads,
things are taken in the order in which they happened.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulator.captures import Capture

Clock = dict[str, int]

LEGACY, LEGACY_HANDLE, PER_THREAD = 0, 1, 2
"""cudaStreamLegacy is handle 1; 0 means it too, unless a program is compiled otherwise. cudaStreamPerThread is handle 2."""


def join(clock: Clock, other: Mapping[str, int]) -> None:
    """Let `clock` know what `other` knows."""
    for actor, tick in other.items():
        if clock.get(actor, 0) < tick:
            clock[actor] = tick


class Work:
    """A piece of work on a stream, which is done after the pieces `after`. mark: it is a place in the stream, and takes no time."""

    __slots__ = ("after", "done", "mark", "run")

    def __init__(self, after: list[Work], run: Callable[[], None] | None, *, mark: bool = True) -> None:
        self.done = False
        self.mark = mark
        self.after = [work for work in after if not work.done]
        self.run = run

    def reached(self) -> bool:
        """Whether it is done, or a place which all work before has been done for."""
        return self.done or (self.mark and all(before.reached() for before in self.after))

    def finish(self) -> None:
        """Do what has to be done before, then the work."""
        stack = [self]
        while stack:
            work = stack[-1]
            waiting = [before for before in work.after if not before.done]
            if waiting and not work.done:
                stack += waiting
                continue
            stack.pop()
            if work.done:
                continue
            work.done = True  # even if it fails: it is not tried again
            run, work.run, work.after = work.run, None, []
            if run is not None:
                run()


@dataclass(frozen=True)
class Use:
    """`nbytes` at `address` are read, or written."""

    address: int
    nbytes: int
    write: bool


@dataclass(frozen=True)
class Action:
    """Work that can be put on a stream, or into a graph.

    run: does it. check: raises RuleError where it must not be launched; called for each launch. kernel: launched on the device of
    the calling thread, which has to be the one of the stream.
    """

    label: str
    uses: tuple[Use, ...]
    run: Callable[[], None] | None = None
    check: Callable[[], None] | None = None
    kernel: bool = False


@dataclass(eq=False)
class Stream:
    """A queue of work. blocking: it waits for the legacy default stream, and that for it."""

    handle: int
    device: int
    blocking: bool
    name: str
    clock: Clock = field(default_factory=dict)
    last: Work | None = None
    capture: Capture | None = None
    destroyed: bool = False

    @property
    def legacy(self) -> bool:
        return self.handle in (LEGACY, LEGACY_HANDLE)


@dataclass(eq=False)
class Event:
    """A place in a stream. captured: the capture that it is a place in. number: counts records, by which times are told."""

    handle: int
    timed: bool
    device: int
    clock: Clock = field(default_factory=dict)
    work: Work | None = None
    captured: Capture | None = None
    number: int | None = None


class Here(threading.local):
    """What CUDA keeps for each thread."""

    device = 0
    capture_mode = "global"

    def __init__(self) -> None:
        self.per_thread: dict[int, Stream] = {}
