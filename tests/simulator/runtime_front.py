# ruff: noqa: N803  (arguments are called as in the module)
"""`cuda.bindings.runtime` on the simulator: the same functions with the same arguments, and the module's own constants."""

from __future__ import annotations

import ctypes
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import runtime as real

from tests.simulator import captures
from tests.simulator.allocation import Allocator
from tests.simulator.errors import CudaError, RuleError
from tests.simulator.machine import Machine
from tests.simulator.memory import Allocation
from tests.simulator.work import Action, Event, Stream, Use

_MODES = {
    real.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal: "global",
    real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal: "thread_local",
    real.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed: "relaxed",
}
_KIND = real.cudaMemcpyKind
_FUNCTION = type(real.cudaMalloc)


class _Last(threading.local):
    """The last error of each thread."""

    status = real.cudaError_t.cudaSuccess


def call(results: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of the module: its status, and `results` values, which are None if it fails."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(self: RuntimeFront, *args: Any) -> tuple[Any, ...]:
            try:
                with self.machine.inside(function.__name__):
                    found = function(self, *args)
            except CudaError as error:
                status = getattr(real.cudaError_t, error.name)
                self._last.status = status
                return (status, *[None] * results)
            return (real.cudaError_t.cudaSuccess, *((found,) if results == 1 else found or ()))

        return run

    return wrap


class RuntimeFront:
    """Stands for the module. A function that is not modelled is an AttributeError; so is a constant that the module lacks."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.allocator = Allocator(machine)
        self._last = _Last()

    def __getattr__(self, name: str) -> Any:
        value = getattr(real, name)
        if isinstance(value, (_FUNCTION, types.BuiltinFunctionType)):
            raise AttributeError(f"the simulator has no {name}")
        return value

    def cudaGetErrorString(self, error: Any) -> tuple[Any, bytes]:
        found: tuple[Any, bytes] = real.cudaGetErrorString(error)
        return found

    def cudaGetErrorName(self, error: Any) -> tuple[Any, bytes]:
        found: tuple[Any, bytes] = real.cudaGetErrorName(error)
        return found

    def cudaGetLastError(self) -> tuple[Any]:
        status, self._last.status = self._last.status, real.cudaError_t.cudaSuccess
        return (status,)

    # Devices.

    @call(1)
    def cudaGetDeviceCount(self) -> int:
        return self.machine.devices

    @call(1)
    def cudaGetDevice(self) -> int:
        return self.machine.here.device

    @call(0)
    def cudaSetDevice(self, device: int) -> None:
        if not 0 <= device < self.machine.devices:
            raise CudaError("cudaErrorInvalidDevice")
        self.machine.here.device = device

    @call(1)
    def cudaGetDeviceProperties(self, device: int) -> Any:
        return types.SimpleNamespace(name=b"Simulated GPU" + b"\0" * 243, major=8, minor=9)

    @call(2)
    def cudaMemGetInfo(self) -> tuple[int, int]:
        space = self.machine.space
        return space.total - space.used.get(self.machine.here.device, 0), space.total

    @call(0)
    def cudaDeviceSynchronize(self) -> None:
        self.machine.synchronize_device(self.machine.here.device)

    # Streams and events.

    def _stream(self, stream: Any) -> Stream:
        return self.machine.stream(int(stream))

    def _event(self, event: Any) -> Event:
        if int(event) not in self.machine.events:
            raise RuleError(f"there is no event {int(event):#x}: it was destroyed, or never made")
        return self.machine.events[int(event)]

    @call(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return real.cudaStream_t(self.machine.stream_create(blocking=flags != real.cudaStreamNonBlocking).handle)

    @call(1)
    def cudaStreamCreate(self) -> Any:
        return real.cudaStream_t(self.machine.stream_create(blocking=True).handle)

    @call(0)
    def cudaStreamDestroy(self, stream: Any) -> None:
        self.machine.stream_destroy(self._stream(stream))

    @call(0)
    def cudaStreamSynchronize(self, stream: Any) -> None:
        self.machine.stream_synchronize(self._stream(stream))

    @call(0)
    def cudaStreamQuery(self, stream: Any) -> None:
        if not self.machine.stream_query(self._stream(stream)):
            raise CudaError("cudaErrorNotReady")

    @call(0)
    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        self.machine.stream_wait_event(self._stream(stream), self._event(event))

    @call(1)
    def cudaEventCreate(self) -> Any:
        return real.cudaEvent_t(self.machine.event_create(timed=True).handle)

    @call(1)
    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        return real.cudaEvent_t(self.machine.event_create(timed=not flags & real.cudaEventDisableTiming).handle)

    @call(0)
    def cudaEventDestroy(self, event: Any) -> None:
        self.machine.event_destroy(self._event(event))

    @call(0)
    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        self.machine.event_record(self._event(event), self._stream(stream))

    @call(0)
    def cudaEventSynchronize(self, event: Any) -> None:
        self.machine.event_synchronize(self._event(event))

    @call(0)
    def cudaEventQuery(self, event: Any) -> None:
        if not self.machine.event_query(self._event(event)):
            raise CudaError("cudaErrorNotReady")

    @call(1)
    def cudaEventElapsedTime(self, start: Any, end: Any) -> float:
        return self.machine.event_elapsed(self._event(start), self._event(end))

    # Memory.

    @call(1)
    def cudaMalloc(self, size: int) -> int:
        return self.allocator.malloc(size).address

    @call(0)
    def cudaFree(self, devPtr: int) -> None:
        if int(devPtr):
            self.allocator.free(int(devPtr))

    @call(1)
    def cudaMallocAsync(self, size: int, hStream: Any) -> int:
        return self.allocator.malloc_async(size, self._stream(hStream)).address

    @call(0)
    def cudaFreeAsync(self, devPtr: int, hStream: Any) -> None:
        self.allocator.free_async(int(devPtr), self._stream(hStream))

    @call(1)
    def cudaMallocHost(self, size: int) -> int:
        return self.allocator.malloc_host(size).address

    @call(1)
    def cudaHostAlloc(self, size: int, flags: int) -> int:
        return self.allocator.malloc_host(size).address

    @call(0)
    def cudaFreeHost(self, ptr: int) -> None:
        self.allocator.free_host(int(ptr))

    @call(1)
    def cudaMallocFromPoolAsync(self, size: int, memPool: Any, stream: Any) -> int:
        return self.allocator.malloc_async(size, self._stream(stream), pool=int(memPool)).address

    @call(1)
    def cudaMemPoolCreate(self, poolProps: Any) -> Any:
        self.machine.unsafe("cudaMemPoolCreate")
        assert poolProps.location.type == real.cudaMemLocationType.cudaMemLocationTypeDevice
        handle = self.machine.handle()
        self.allocator.pools.add(handle)
        return real.cudaMemPool_t(handle)

    @call(0)
    def cudaMemPoolDestroy(self, memPool: Any) -> None:
        self.machine.unsafe("cudaMemPoolDestroy")
        self.allocator.destroy_pool(int(memPool))

    @call(1)
    def cudaPointerGetAttributes(self, ptr: int) -> Any:
        segment = self.machine.space.at(int(ptr))
        kinds = real.cudaMemoryType
        if segment is None or segment.owner is None:
            return types.SimpleNamespace(type=kinds.cudaMemoryTypeUnregistered, device=-2)
        device = segment.owner.device
        kind = kinds.cudaMemoryTypeHost if device is None else kinds.cudaMemoryTypeDevice
        return types.SimpleNamespace(type=kind, device=device or 0, devicePointer=int(ptr))

    @call(1)
    def cudaDeviceGetDefaultMemPool(self, device: int) -> Any:
        return real.cudaMemPool_t(device)

    @call(0)
    def cudaMemPoolSetAttribute(self, memPool: Any, attr: Any, value: Any) -> None:
        assert attr in real.cudaMemPoolAttr

    @call(0)
    def cudaMemPoolTrimTo(self, memPool: Any, minBytesToKeep: int) -> None:
        self.machine.unsafe("cudaMemPoolTrimTo")
        self.allocator.trim(int(memPool))

    @call(0)
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> None:
        address = int(devPtr)
        action = Action(
            "cudaMemsetAsync", (Use(address, count, True),), lambda: self.machine.space.bytes(address, count).fill(value)
        )
        self.machine.launch(self._stream(stream), action)

    @call(0)
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> None:
        copy(self.machine, self._stream(stream), int(dst), int(src), count, kind)

    @call(0)
    def cudaMemcpy(self, dst: int, src: int, count: int, kind: Any) -> None:
        stream = self._stream(0)
        copy(self.machine, stream, int(dst), int(src), count, kind)
        self.machine.synchronize(stream)

    # Captures.

    @call(0)
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        captures.begin(self.machine, self._stream(stream), _MODES[mode])

    @call(1)
    def cudaStreamEndCapture(self, stream: Any) -> Any:
        graph = captures.end(self.machine, self._stream(stream))
        handle = self.machine.handle()
        self.machine.graphs[handle] = graph
        return real.cudaGraph_t(handle)

    @call(1)
    def cudaStreamIsCapturing(self, stream: Any) -> Any:
        capture = self._stream(stream).capture
        names = real.cudaStreamCaptureStatus
        if capture is None:
            return names.cudaStreamCaptureStatusNone
        return names.cudaStreamCaptureStatusInvalidated if capture.invalid else names.cudaStreamCaptureStatusActive

    @call(1)
    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> Any:
        before = next(key for key, name in _MODES.items() if name == self.machine.here.capture_mode)
        self.machine.here.capture_mode = _MODES[mode]
        return before

    @call(1)
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        self.machine.unsafe("cudaGraphInstantiate")
        handle = self.machine.handle()
        captured = self.machine.graphs[int(graph)]
        assert isinstance(captured, captures.Graph)
        self.machine.graphs[handle] = captured
        return real.cudaGraphExec_t(handle)

    @call(0)
    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> None:
        graph = self.machine.graphs.get(int(graphExec))
        if graph is None:
            raise RuleError("a graph that was destroyed, or never made, is launched")
        assert isinstance(graph, captures.Graph)
        captures.launch(self.machine, graph, self._stream(stream))

    @call(0)
    def cudaGraphExecDestroy(self, graphExec: Any) -> None:
        self.machine.unsafe("cudaGraphExecDestroy")
        del self.machine.graphs[int(graphExec)]

    @call(0)
    def cudaGraphDestroy(self, graph: Any) -> None:
        del self.machine.graphs[int(graph)]


def copy(machine: Machine, stream: Stream, to: int, source: int, count: int, kind: Any) -> None:
    """cudaMemcpyAsync. From pageable memory the bytes are taken at once; to pageable memory it waits.

    Source: CUDA Runtime API, "API synchronization behavior".
    """
    if not count:
        return
    target, origin = _host(machine, to), _host(machine, source)
    expected = {
        _KIND.cudaMemcpyHostToDevice: (False, True), _KIND.cudaMemcpyDeviceToHost: (True, False),
        _KIND.cudaMemcpyDeviceToDevice: (False, False), _KIND.cudaMemcpyHostToHost: (True, True),
    }.get(kind)  # fmt: skip
    on_host = (target is not False, origin is not False)
    if expected is not None and on_host != expected:
        raise RuleError(f"cudaMemcpyAsync from {source:#x} to {to:#x} is said to be {kind.name}, which it is not")
    uses = []
    if origin is None:  # pageable
        content = np.frombuffer(ctypes.string_at(source, count), np.uint8)
    else:
        content = machine.space.bytes(source, count)
        uses.append(Use(source, count, False))
    if target is None:
        into = np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(to))
    else:
        into = machine.space.bytes(to, count)
        uses.append(Use(to, count, True))
    machine.put(stream, Action("cudaMemcpyAsync", tuple(uses), lambda: into.__setitem__(slice(None), content)))
    if target is None:
        machine.synchronize(stream)


def _host(machine: Machine, address: int) -> Allocation | bool | None:
    """Whether an address is the host's: the owner of pinned memory, None for pageable memory; False for the device's."""
    segment = machine.space.at(address)
    if segment is None:
        return None
    if segment.owner is not None and segment.owner.device is None:
        return segment.owner
    return False
