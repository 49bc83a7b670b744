"""CUDA through cuda-python (package cuda-bindings)."""

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

from deploy.engine.cuda import Device, DeviceMemoryError, Event, Gpu, Graph, Memory, Stream
from deploy.engine.cuda.driver import driver_version
from deploy.errors import BackendError

_KIND = cudart.cudaMemcpyKind


class RuntimeStream(Stream):
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def synchronize(self) -> None:
        _call(cudart.cudaStreamSynchronize(self.handle))


class RuntimeEvent(Event):
    def __init__(self, *, timed: bool) -> None:
        flags = cudart.cudaEventDefault if timed else cudart.cudaEventDisableTiming
        (self._event,) = _call(cudart.cudaEventCreateWithFlags(flags))
        weakref.finalize(self, cudart.cudaEventDestroy, self._event)

    def record(self, stream: Stream) -> None:
        _call(cudart.cudaEventRecord(self._event, stream.handle))

    def hold(self, stream: Stream) -> None:
        _call(cudart.cudaStreamWaitEvent(stream.handle, self._event, 0))

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, RuntimeEvent)
        (ms,) = _call(cudart.cudaEventElapsedTime(earlier._event, self._event))
        return float(ms)


class RuntimeMemory(Memory):
    def __init__(self, pointer: int, nbytes: int) -> None:
        self.pointer = pointer
        self.nbytes = nbytes
        weakref.finalize(self, cudart.cudaFree, pointer)

    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None:
        to = self.pointer + offset
        _call(cudart.cudaMemcpyAsync(to, host.ctypes.data, host.size, _KIND.cudaMemcpyHostToDevice, stream.handle))

    def read(self, host: np.ndarray, stream: Stream) -> None:
        _call(cudart.cudaMemcpyAsync(host.ctypes.data, self.pointer, host.size, _KIND.cudaMemcpyDeviceToHost, stream.handle))

    def copy(self, source: int, nbytes: int, stream: Stream) -> None:
        _call(cudart.cudaMemcpyAsync(self.pointer, source, nbytes, _KIND.cudaMemcpyDeviceToDevice, stream.handle))


class RuntimeGraph(Graph):
    def __init__(self, graph: Any) -> None:
        (self._executable,) = _call(cudart.cudaGraphInstantiate(graph, 0))
        weakref.finalize(self, cudart.cudaGraphExecDestroy, self._executable)
        _call(cudart.cudaGraphDestroy(graph))

    def launch(self, stream: Stream) -> None:
        _call(cudart.cudaGraphLaunch(self._executable, stream.handle))


class RuntimeDevice(Device):
    library = "cuda-python"

    def __init__(self, index: int) -> None:
        self.index = index

    def gpu(self) -> Gpu:
        (found,) = _call(cudart.cudaGetDeviceProperties(self.index))
        name = found.name.rstrip(b"\0").decode()
        return Gpu(name=name, compute_capability=f"{found.major}.{found.minor}", driver=driver_version())

    @contextmanager
    def active(self) -> Iterator[None]:
        (before,) = _call(cudart.cudaGetDevice())
        if before == self.index:
            yield
            return
        self._choose()
        try:
            yield
        finally:
            _call(cudart.cudaSetDevice(before))

    def memory(self) -> tuple[int, int]:
        self._choose()
        free, total = _call(cudart.cudaMemGetInfo())
        return int(free), int(total)

    def allocate(self, nbytes: int) -> Memory:
        self._choose()
        error, pointer = cudart.cudaMalloc(max(nbytes, 1))
        if error == cudart.cudaError_t.cudaErrorMemoryAllocation:
            cudart.cudaGetLastError()  # or the next call would report it again
            raise DeviceMemoryError(nbytes, *self.memory())
        _call((error,))
        return RuntimeMemory(int(pointer), max(nbytes, 1))

    def pinned(self, nbytes: int) -> np.ndarray:
        self._choose()
        (pointer,) = _call(cudart.cudaHostAlloc(max(nbytes, 1), cudart.cudaHostAllocDefault))
        buffer = (ctypes.c_uint8 * max(nbytes, 1)).from_address(int(pointer))
        weakref.finalize(buffer, cudart.cudaFreeHost, int(pointer))
        array: np.ndarray = np.ctypeslib.as_array(buffer)
        return array

    def stream(self) -> Stream:
        self._choose()
        (handle,) = _call(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        stream = RuntimeStream(int(handle))
        weakref.finalize(stream, cudart.cudaStreamDestroy, int(handle))
        return stream

    def wait_for(self, handle: int, stream: Stream) -> None:
        event = self.event()
        event.record(RuntimeStream(handle))
        event.hold(stream)

    def event(self, *, timed: bool = False) -> Event:
        self._choose()
        return RuntimeEvent(timed=timed)

    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        # thread-local: other threads of the program may use CUDA meanwhile.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call(cudart.cudaStreamBeginCapture(stream.handle, mode))
        try:
            work()
        finally:
            error, graph = cudart.cudaStreamEndCapture(
                stream.handle
            )  # even if the work failed, or the stream would go on capturing
        _call((error,))
        return RuntimeGraph(graph)

    def _choose(self) -> None:
        """The device is a setting of each thread."""
        _call(cudart.cudaSetDevice(self.index))


def _call(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results of a call, without its status. Raises BackendError unless the status is success."""
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(status)
        raise BackendError(f"CUDA failed: {text.decode() if isinstance(text, bytes) else text} ({status.name})")
    return tuple(values)


def open_device(index: int) -> Device:
    (count,) = _call(cudart.cudaGetDeviceCount())
    if index >= count:
        raise BackendError(f"there is no cuda:{index}: CUDA sees {count} devices")
    return RuntimeDevice(index)
