"""Stream captures, and the graphs that they end as."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from tests.simulator.errors import CudaError, RuleError
from tests.simulator.memory import Allocation, site
from tests.simulator.work import Action, Clock, Event, Stream, Work, join

if TYPE_CHECKING:
    from tests.simulator.machine import Machine

MODES = ("global", "thread_local", "relaxed")

Entry = tuple[Action, tuple[Allocation, ...] | None]
"""An action, and the owners that its memory had when it was captured; None where it was not."""


class _Node(NamedTuple):
    action: Action
    owners: tuple[Allocation, ...]
    actor: str
    tick: int
    label: str


class Capture:
    """A capture under way, which began on the stream `origin`. invalid: why it cannot become a graph."""

    def __init__(self, machine: Machine, origin: Stream, mode: str) -> None:
        self.machine = machine
        self.origin = origin
        self.mode = mode
        self.thread = threading.get_ident()
        self.streams = [origin]
        self.clocks: dict[str, Clock] = {origin.name: {}}
        self.nodes: list[_Node] = []
        self.invalid: str | None = None
        self.ended = False

    def invalidate(self, reason: str) -> None:
        if self.invalid is None:
            self.invalid = f"{reason} ({site()})"

    def _check_valid(self) -> None:
        if self.invalid is not None:
            raise CudaError("cudaErrorStreamCaptureInvalidated")

    def add(self, stream: Stream, action: Action, owners: tuple[Allocation, ...]) -> None:
        self._check_valid()
        clock = self.clocks[stream.name]
        tick = clock[stream.name] = clock.get(stream.name, 0) + 1
        label = f"{action.label} on {stream.name} ({site()})"
        for earlier in self.nodes:
            if clock.get(earlier.actor, 0) < earlier.tick and _conflict(earlier.action, action):
                raise RuleError(f"no ordering in the graph: {label} uses memory of {earlier.label}")
        self.nodes.append(_Node(action, owners, stream.name, tick, label))

    def let_wait(self, stream: Stream, event: Event) -> None:
        """Let a stream wait for an event of this capture: it takes part from then on."""
        if self.ended:
            raise CudaError("cudaErrorCapturedEvent")
        self._check_valid()
        if stream.capture is not None and stream.capture is not self:
            stream.capture.invalidate("an event of another capture was waited for")
            self.invalidate("a stream of another capture waits for it")
            raise CudaError("cudaErrorStreamCaptureMerge")
        if stream.legacy:
            self.invalidate("the legacy default stream waits for it")
            raise CudaError("cudaErrorStreamCaptureImplicit")
        if stream.capture is None:
            stream.capture = self
            self.streams.append(stream)
            self.clocks[stream.name] = {}
        clock = self.clocks[stream.name]
        join(clock, event.clock)
        clock[stream.name] = clock.get(stream.name, 0) + 1

    def unjoined(self) -> list[str]:
        """The streams that have work of which the origin knows nothing."""
        known = self.clocks[self.origin.name]
        return [
            stream.name for stream in self.streams[1:] if self.clocks[stream.name].get(stream.name, 0) > known.get(stream.name, 0)
        ]


class Graph:
    """What was captured; it can be launched. last: its last launch, which the next one comes after."""

    def __init__(self, nodes: list[_Node]) -> None:
        self.entries: list[Entry] = [(node.action, node.owners) for node in nodes]
        self.last: Work | None = None
        self.clock: Clock = {}


def _conflict(a: Action, b: Action) -> bool:
    return any(
        x.address < y.address + y.nbytes and y.address < x.address + x.nbytes and (x.write or y.write)
        for x in a.uses
        for y in b.uses
    )


def begin(machine: Machine, stream: Stream, mode: str) -> None:
    """cudaStreamBeginCapture."""
    assert mode in MODES
    machine.check_alive(stream)
    if stream.legacy:
        raise CudaError("cudaErrorStreamCaptureUnsupported")
    if stream.capture is not None:
        raise CudaError("cudaErrorIllegalState")
    stream.capture = Capture(machine, stream, mode)
    machine.captures.append(stream.capture)


def end(machine: Machine, stream: Stream) -> Graph:
    """cudaStreamEndCapture; the capture is over even if this fails."""
    capture = stream.capture
    if capture is None or capture.origin is not stream:
        raise CudaError("cudaErrorIllegalState" if capture is None else "cudaErrorStreamCaptureUnmatched")
    if capture.thread != threading.get_ident() and capture.mode != "relaxed":
        capture.invalidate("it was ended in another thread")
        raise CudaError("cudaErrorStreamCaptureWrongThread")
    capture.ended = True
    machine.captures.remove(capture)
    for taking_part in capture.streams:
        taking_part.capture = None
    if capture.invalid is not None:
        raise CudaError("cudaErrorStreamCaptureInvalidated")
    if capture.unjoined():
        raise CudaError("cudaErrorStreamCaptureUnjoined")
    return Graph(capture.nodes)


def launch(machine: Machine, graph: Graph, stream: Stream) -> None:
    """cudaGraphLaunch: after the work of the stream, and after the last launch of the same graph."""
    machine.check_alive(stream)
    if stream.device != machine.here.device:
        raise RuleError(
            f"a graph is launched on {stream.name} of cuda:{stream.device}: the thread is on cuda:{machine.here.device}"
        )
    if stream.capture is not None:
        for action, owners in graph.entries:
            assert owners is not None
            stream.capture.add(stream, action, owners)
        return
    graph.last = machine.enqueue(stream, graph.entries, after=graph.last, clock=graph.clock)
    graph.clock = dict(stream.clock)
