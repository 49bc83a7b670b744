"""torch.cuda's streams, events and graphs, below the Python that torch puts around them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from cuda.bindings import runtime

from tests.simulator import captures
from tests.simulator.errors import CudaError
from tests.simulator.machine import Machine
from tests.simulator.torch_memory import CachingAllocator
from tests.simulator.work import LEGACY, LEGACY_HANDLE
from tests.simulator.work import Event as CudaEvent
from tests.simulator.work import Stream as CudaStream

POOL = 32
"""The streams that torch has for each device, handed out in turn (c10/cuda/CUDAStream.h)."""


class State:
    """What the classes of this file work on; `machine` is replaced for each test."""

    machine: ClassVar[Machine]
    memory: ClassVar[CachingAllocator]
    pools: ClassVar[dict[int, list[Stream]]]
    current: ClassVar[Any]
    turn: ClassVar[dict[int, int]]


@contextlib.contextmanager
def as_torch() -> Iterator[None]:
    """Errors as torch reports them."""
    try:
        yield
    except CudaError as error:
        if error.name == "cudaErrorMemoryAllocation":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than the simulator has.") from None
        _, text = runtime.cudaGetErrorString(getattr(runtime.cudaError_t, error.name))
        raise torch.AcceleratorError(f"CUDA error: {text.decode()} ({error.name})") from None


class Stream:
    """torch.cuda.Stream: one of the 32 of the device, in turn."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        index = _index(device)
        with State.machine.lock:
            pool = State.pools.setdefault(index, [])
            if len(pool) < POOL:
                pool.append(_wrap(State.machine.stream_create(blocking=False, device=index)))
            turn = State.turn[index] = State.turn.get(index, -1) + 1
            return pool[turn % POOL]

    inner: CudaStream

    @property
    def cuda_stream(self) -> int:
        return self.inner.handle

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.inner.device)

    @property
    def device_index(self) -> int:
        return self.inner.device

    def synchronize(self) -> None:
        with as_torch():
            State.machine.stream_synchronize(self.inner)

    def query(self) -> bool:
        with as_torch():
            return bool(State.machine.stream_query(self.inner))

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.inner is self.inner

    def __hash__(self) -> int:
        return hash(self.inner.handle)

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.cuda_stream)


def _wrap(inner: CudaStream, cls: type[Stream] = Stream) -> Stream:
    made = object.__new__(cls)
    made.inner = inner
    return made


class ExternalStream(Stream):
    """torch.cuda.ExternalStream: handle 1 is refused at its first use (seen with torch 2.11)."""

    def __new__(cls, stream_ptr: int, device: Any = None, **kwargs: Any) -> ExternalStream:
        if stream_ptr == LEGACY_HANDLE:
            return object.__new__(_Unknown)
        before, State.machine.here.device = State.machine.here.device, _index(device)
        try:
            with State.machine.lock:
                made = _wrap(State.machine.stream(stream_ptr), cls)
        finally:
            State.machine.here.device = before
        assert isinstance(made, ExternalStream)
        return made


class _Unknown(ExternalStream):
    """A stream that torch makes and does not know."""

    @property
    def inner(self) -> CudaStream:
        raise RuntimeError("invalid StreamId1")

    @inner.setter
    def inner(self, inner: CudaStream) -> None:
        raise AssertionError("there is none")


class Event:
    """torch.cuda.Event: made when it is first recorded, and destroyed with its object."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self.enable_timing = enable_timing
        self.inner: CudaEvent | None = None
        self._machine = State.machine

    def __del__(self) -> None:
        if self.inner is not None:
            self._machine.dropped.append(functools.partial(self._machine.events.__delitem__, self.inner.handle))

    def record(self, stream: Stream | None = None) -> None:
        stream = current_stream() if stream is None else stream
        with as_torch():
            if self.inner is None:
                self.inner = State.machine.event_create(timed=self.enable_timing)
                self.inner.device = stream.inner.device
            if self.inner.device != stream.inner.device:
                raise RuntimeError("Event device does not match recording stream's device")
            State.machine.event_record(self.inner, stream.inner)

    def wait(self, stream: Stream | None = None) -> None:
        stream = current_stream() if stream is None else stream
        if self.inner is not None:
            with as_torch():
                State.machine.stream_wait_event(stream.inner, self.inner)

    def query(self) -> bool:
        with as_torch():
            return self.inner is None or bool(State.machine.event_query(self.inner))

    def synchronize(self) -> None:
        if self.inner is not None:
            with as_torch():
                State.machine.event_synchronize(self.inner)

    def elapsed_time(self, end_event: Event) -> float:
        if not (self.enable_timing and end_event.enable_timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self.inner is None or end_event.inner is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        with as_torch():
            return float(State.machine.event_elapsed(self.inner, end_event.inner))


class CUDAGraph:
    """torch.cuda.CUDAGraph: captures the current stream; memory allocated meanwhile is the graph's own."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._graph: captures.Graph | None = None
        self._capture: captures.Capture | None = None
        self._memory = State.memory

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", check_input_liveness: bool = False) -> None:
        stream = current_stream()
        if stream.inner.legacy:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        with as_torch(), State.machine.inside("capture_begin"):
            captures.begin(State.machine, stream.inner, capture_error_mode)
            self._capture = stream.inner.capture

    def capture_end(self) -> None:
        with as_torch(), State.machine.inside("capture_end"):
            assert self._capture is not None
            self._graph = captures.end(State.machine, self._capture.origin)

    def replay(self) -> None:
        with as_torch(), State.machine.inside("graph_launch"):
            if self._graph is None:
                raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
            captures.launch(State.machine, self._graph, current_stream().inner)

    def reset(self) -> None:
        self._graph = None
        if self._capture is not None:
            self._memory.drop_pool(self._capture)
            self._capture = None

    def pool(self) -> tuple[int, int]:
        return (0, id(self))

    def __del__(self) -> None:
        if self._capture is not None:
            memory, capture = self._memory, self._capture
            memory.machine.dropped.append(lambda: memory.drop_pool(capture))


def _index(device: Any) -> int:
    if device is None or device == "cuda":
        return State.machine.here.device
    index = device if isinstance(device, int) else torch.device(device).index
    return State.machine.here.device if index is None else index


def current_stream(device: Any = None) -> Stream:
    index = _index(device)
    chosen: Stream | None = getattr(State.current, f"on{index}", None)
    return default_stream(index) if chosen is None else chosen


def default_stream(device: Any = None) -> Stream:
    inner = State.machine.legacy[_index(device)]
    assert inner.handle == LEGACY
    return _wrap(inner)


def set_stream(stream: Stream) -> None:
    if stream is not None:
        State.machine.here.device = stream.inner.device
        setattr(State.current, f"on{stream.inner.device}", stream)
