"""CUDA through pycuda, in the primary context of the device.

pycuda has neither streams of other libraries nor graphs: where the first are waited for, it waits for the whole GPU, and the
second are refused. Its objects give back what they hold only while their context is current: each is dropped under it here,
whichever thread that happens in.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import numpy as np
import pycuda.driver as cuda

from deploy.engine.cuda import Device, DeviceMemoryError, Event, Gpu, Graph, Memory, Stream, release_torch_cache, when_dropped
from deploy.engine.cuda.driver import driver_version
from deploy.errors import BackendError

_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING of cuda.h, for which pycuda has no name."""

_contexts: dict[int, Any] = {}
"""The primary context by device, kept until the process ends: pycuda can release it on the thread that asked for it alone."""


class PycudaStream(Stream):
    def __init__(self, device: "PycudaDevice") -> None:
        self._held = [cuda.Stream(_NON_BLOCKING)]
        self.handle = self._held[0].handle
        when_dropped(self, _drop, device, self._held)

    @property
    def stream(self) -> Any:
        return self._held[0]

    def synchronize(self) -> None:
        self.stream.synchronize()


class _ExternalStream(Stream):
    """A stream that pycuda cannot name. Who waits for it waits for the whole GPU, and what it waits for is waited for here."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def synchronize(self) -> None:
        cuda.Context.synchronize()


class PycudaEvent(Event):
    def __init__(self, device: "PycudaDevice", *, timed: bool) -> None:
        self._held = [cuda.Event(cuda.event_flags.DEFAULT if timed else cuda.event_flags.DISABLE_TIMING)]
        when_dropped(self, _drop, device, self._held)

    def record(self, stream: Stream) -> None:
        if isinstance(stream, PycudaStream):
            self._held[0].record(stream.stream)
        else:
            stream.synchronize()
            self._held[0].record()

    def hold(self, stream: Stream) -> None:
        if isinstance(stream, PycudaStream):
            stream.stream.wait_for_event(self._held[0])
        else:
            self._held[0].synchronize()

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, PycudaEvent)
        return float(earlier._held[0].time_till(self._held[0]))


class PycudaMemory(Memory):
    """The GPU is waited for before it is freed: pycuda has no memory that is freed in the order of a stream."""

    def __init__(self, device: "PycudaDevice", nbytes: int) -> None:
        memory = cuda.mem_alloc(nbytes)
        self.pointer = int(memory)
        self.nbytes = nbytes
        when_dropped(self, _free, device, memory)

    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None:
        cuda.memcpy_htod_async(self.pointer + offset, host, _stream(stream))

    def read(self, host: np.ndarray, stream: Stream) -> None:
        cuda.memcpy_dtoh_async(host, self.pointer, _stream(stream))


class PycudaDevice(Device):
    library = "pycuda"

    def __init__(self, index: int, count: int) -> None:
        self.index = index
        self.count = count
        self._device = cuda.Device(index)
        if index not in _contexts:
            _contexts[index] = self._device.retain_primary_context()
        self._context = _contexts[index]

    def gpu(self) -> Gpu:
        major, minor = self._device.compute_capability()
        return Gpu(name=self._device.name(), compute_capability=f"{major}.{minor}", driver=driver_version())

    def active(self) -> AbstractContextManager[object]:
        return self._current()

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        except cuda.Error as error:
            raise BackendError(f"CUDA failed: {error}") from error
        finally:
            self._context.pop()

    def memory(self) -> tuple[int, int]:
        free, total = cuda.mem_get_info()
        return free, total

    def allocate(self, nbytes: int, stream: Stream) -> Memory:
        try:
            return PycudaMemory(self, max(nbytes, 1))
        except cuda.MemoryError:
            self.trim()
        try:
            return PycudaMemory(self, max(nbytes, 1))
        except cuda.MemoryError as error:
            raise DeviceMemoryError(nbytes, *self.memory()) from error

    def trim(self) -> None:
        release_torch_cache()

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        cuda.memcpy_dtod_async(target, source, nbytes, _stream(stream))

    def owner(self, pointer: int) -> int | None:
        return None

    def pinned(self, nbytes: int) -> np.ndarray:
        array: np.ndarray = cuda.pagelocked_empty(max(nbytes, 1), np.uint8)
        when_dropped(array, _free, self, array.base)
        return array[:nbytes]

    def stream(self) -> Stream:
        return PycudaStream(self)

    def external(self, handle: int) -> Stream:
        return _ExternalStream(handle)

    def event(self, *, timed: bool = False) -> Event:
        return PycudaEvent(self, timed=timed)

    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        raise BackendError("pycuda has no CUDA graphs: install cuda-python")


def _drop(device: PycudaDevice, held: list[Any]) -> None:
    """Drop the last reference to an object of pycuda. A GPU that has failed for good frees all with the process."""
    with suppress(BackendError), device.active():
        held.clear()


def _free(device: PycudaDevice, allocation: Any) -> None:
    with suppress(BackendError), device.active():
        cuda.Context.synchronize()
        allocation.free()


def _stream(stream: Stream) -> Any:
    """None, which is pycuda's name of the default stream, for any but its own."""
    return stream.stream if isinstance(stream, PycudaStream) else None


def open_device(index: int) -> Device:
    try:
        cuda.init()
        count = cuda.Device.count()
    except cuda.Error as error:
        raise BackendError(f"CUDA cannot start: {error}") from error
    if index >= count:
        raise BackendError(f"there is no cuda:{index}: CUDA sees {count} devices")
    return PycudaDevice(index, count)
