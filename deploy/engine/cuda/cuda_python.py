"""CUDA through cuda-python (package cuda-bindings, which torch's CUDA wheels bring along)."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.bindings import runtime as cudart

from deploy.engine.cuda import (
    LEGACY,
    Device,
    DeviceMemoryError,
    Event,
    Gpu,
    Graph,
    Memory,
    Stream,
    release_torch_cache,
    when_dropped,
)
from deploy.engine.cuda.capturing import capturing
from deploy.engine.cuda.driver import driver_version
from deploy.errors import BackendError

_KIND = cudart.cudaMemcpyKind
_SUCCESS = cudart.cudaError_t.cudaSuccess
_OUT_OF_MEMORY = cudart.cudaError_t.cudaErrorMemoryAllocation
_RELAXED = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
_HERE = nullcontext()


class RuntimeStream(Stream):
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def synchronize(self) -> None:
        _call(cudart.cudaStreamSynchronize(self.handle))


class RuntimeEvent(Event):
    def __init__(self, *, timed: bool) -> None:
        flags = cudart.cudaEventDefault if timed else cudart.cudaEventDisableTiming
        (self._event,) = _call(cudart.cudaEventCreateWithFlags(flags))
        when_dropped(self, _release, cudart.cudaEventDestroy, self._event)

    def record(self, stream: Stream) -> None:
        _call(cudart.cudaEventRecord(self._event, stream.handle))

    def hold(self, stream: Stream) -> None:
        _call(cudart.cudaStreamWaitEvent(stream.handle, self._event, 0))

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, RuntimeEvent)
        (ms,) = _call(cudart.cudaEventElapsedTime(earlier._event, self._event))
        return float(ms)


class _Pool:
    """A memory pool of our own: those of other libraries keep their settings, and it keeps what is freed for the next run."""

    def __init__(self, index: int) -> None:
        properties = cudart.cudaMemPoolProps()
        properties.allocType = cudart.cudaMemAllocationType.cudaMemAllocationTypePinned
        place = cudart.cudaMemLocation()
        place.type = cudart.cudaMemLocationType.cudaMemLocationTypeDevice
        place.id = index
        properties.location = place
        (self.handle,) = _call(cudart.cudaMemPoolCreate(properties))
        when_dropped(self, _release, cudart.cudaMemPoolDestroy, self.handle)
        threshold = cudart.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        _call(cudart.cudaMemPoolSetAttribute(self.handle, threshold, driver.cuuint64_t(2**64 - 1)))


class RuntimeMemory(Memory):
    def __init__(self, pointer: int, nbytes: int, stream: Stream, pool: _Pool) -> None:
        self.pointer = pointer
        self.nbytes = nbytes
        when_dropped(self, _free, pointer, stream, pool)

    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None:
        to = self.pointer + offset
        _call(cudart.cudaMemcpyAsync(to, host.ctypes.data, host.size, _KIND.cudaMemcpyHostToDevice, stream.handle))

    def read(self, host: np.ndarray, stream: Stream) -> None:
        _call(cudart.cudaMemcpyAsync(host.ctypes.data, self.pointer, host.size, _KIND.cudaMemcpyDeviceToHost, stream.handle))


def _free(pointer: int, stream: Stream, pool: _Pool) -> None:
    """Freed in the order of `stream`, which lives until then, as does `pool`."""
    _release(cudart.cudaFreeAsync, pointer, stream.handle)


def _release(function: Callable[..., object], *arguments: object) -> None:
    """Release what was dropped. A garbage collection may do so amid a capture of this thread, which this would end if the thread
    were not relaxed meanwhile. The status says nothing: a dead GPU refuses all."""
    _, before = cudart.cudaThreadExchangeStreamCaptureMode(_RELAXED)
    function(*arguments)
    if before is not None:
        cudart.cudaThreadExchangeStreamCaptureMode(before)


class RuntimeGraph(Graph):
    def __init__(self, graph: Any) -> None:
        try:
            (self._executable,) = _call(cudart.cudaGraphInstantiate(graph, 0))
        finally:
            cudart.cudaGraphDestroy(graph)
        when_dropped(self, _release, cudart.cudaGraphExecDestroy, self._executable)

    def launch(self, stream: Stream) -> None:
        _call(cudart.cudaGraphLaunch(self._executable, stream.handle))


class RuntimeDevice(Device):
    library = "cuda-python"

    def __init__(self, index: int, count: int) -> None:
        self.index = index
        self.count = count
        with self.active():
            self._pool = _Pool(index)

    def gpu(self) -> Gpu:
        (found,) = _call(cudart.cudaGetDeviceProperties(self.index))
        name = found.name.rstrip(b"\0").decode()
        return Gpu(name=name, compute_capability=f"{found.major}.{found.minor}", driver=driver_version())

    def active(self) -> AbstractContextManager[object]:
        (before,) = _call(cudart.cudaGetDevice())
        return _HERE if before == self.index else self._switched(before)

    @contextmanager
    def _switched(self, before: int) -> Iterator[None]:
        _call(cudart.cudaSetDevice(self.index))
        try:
            yield
        finally:
            _call(cudart.cudaSetDevice(before))

    def memory(self) -> tuple[int, int]:
        free, total = _call(cudart.cudaMemGetInfo())
        return int(free), int(total)

    def allocate(self, nbytes: int, stream: Stream) -> Memory:
        nbytes = max(nbytes, 1)
        error, pointer = cudart.cudaMallocFromPoolAsync(nbytes, self._pool.handle, stream.handle)
        if error == _OUT_OF_MEMORY:
            self.trim()
            error, pointer = cudart.cudaMallocFromPoolAsync(nbytes, self._pool.handle, stream.handle)
        if error == _OUT_OF_MEMORY:
            cudart.cudaGetLastError()
            raise DeviceMemoryError(nbytes, *self.memory())
        _call((error,))
        return RuntimeMemory(int(pointer), nbytes, stream, self._pool)

    def trim(self) -> None:
        _call(cudart.cudaMemPoolTrimTo(self._pool.handle, 0))
        release_torch_cache()

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        _call(cudart.cudaMemcpyAsync(target, source, nbytes, _KIND.cudaMemcpyDeviceToDevice, stream.handle))

    def owner(self, pointer: int) -> int | None:
        (found,) = _call(cudart.cudaPointerGetAttributes(pointer))
        return int(found.device)

    def pinned(self, nbytes: int) -> np.ndarray:
        (pointer,) = _call(cudart.cudaHostAlloc(max(nbytes, 1), cudart.cudaHostAllocDefault))
        buffer = (ctypes.c_uint8 * max(nbytes, 1)).from_address(int(pointer))
        when_dropped(buffer, _release, cudart.cudaFreeHost, int(pointer))
        array: np.ndarray = np.ctypeslib.as_array(buffer)
        return array[:nbytes]

    def stream(self) -> Stream:
        (handle,) = _call(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        stream = RuntimeStream(int(handle))
        when_dropped(stream, _release, cudart.cudaStreamDestroy, int(handle))
        return stream

    def external(self, handle: int) -> Stream:
        return RuntimeStream(handle or LEGACY)

    def event(self, *, timed: bool = False) -> Event:
        return RuntimeEvent(timed=timed)

    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        # thread-local: other threads of the program may use CUDA meanwhile.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with capturing:
            _call(cudart.cudaStreamBeginCapture(stream.handle, mode))
            try:
                work()
            except BaseException:
                _, graph = cudart.cudaStreamEndCapture(stream.handle)  # or the stream would go on capturing
                if graph is not None:
                    cudart.cudaGraphDestroy(graph)
                cudart.cudaGetLastError()
                raise
            (graph,) = _call(cudart.cudaStreamEndCapture(stream.handle))
            return RuntimeGraph(graph)


def _call(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results of a call, without its status. Raises BackendError unless the status is success."""
    status, *values = result
    if status != _SUCCESS:
        cudart.cudaGetLastError()  # it is reported here, and not once more by the next call of another library
        _, text = cudart.cudaGetErrorString(status)
        raise BackendError(f"CUDA failed: {text.decode() if isinstance(text, bytes) else text} ({status.name})")
    return tuple(values)


def open_device(index: int) -> Device:
    (count,) = _call(cudart.cudaGetDeviceCount())
    if index >= count:
        raise BackendError(f"there is no cuda:{index}: CUDA sees {count} devices")
    return RuntimeDevice(index, count)
