"""CUDA through pycuda, in the primary context of the device, which it shares with every other library.

pycuda has neither streams of other libraries nor graphs: the first are waited for with all else, the second refused.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pycuda.driver as cuda

from deploy.engine.cuda import Device, DeviceMemoryError, Event, Gpu, Graph, Memory, Stream
from deploy.engine.cuda.driver import driver_version
from deploy.errors import BackendError


class PycudaStream(Stream):
    def __init__(self, device: "PycudaDevice") -> None:
        self.stream = cuda.Stream()
        self.handle = self.stream.handle
        self._device = device

    def synchronize(self) -> None:
        with self._device.current():
            self.stream.synchronize()


class PycudaEvent(Event):
    def __init__(self, device: "PycudaDevice", *, timed: bool) -> None:
        self._event = cuda.Event(cuda.event_flags.DEFAULT if timed else cuda.event_flags.DISABLE_TIMING)
        self._device = device

    def record(self, stream: Stream) -> None:
        with self._device.current():
            self._event.record(_stream(stream))

    def hold(self, stream: Stream) -> None:
        with self._device.current():
            _stream(stream).wait_for_event(self._event)

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, PycudaEvent)
        with self._device.current():
            return float(earlier._event.time_till(self._event))


class PycudaMemory(Memory):
    def __init__(self, device: "PycudaDevice", nbytes: int) -> None:
        self._memory = cuda.mem_alloc(nbytes)
        self._device = device
        self.pointer = int(self._memory)
        self.nbytes = nbytes

    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None:
        with self._device.current():
            cuda.memcpy_htod_async(self.pointer + offset, host, _stream(stream))

    def read(self, host: np.ndarray, stream: Stream) -> None:
        with self._device.current():
            cuda.memcpy_dtoh_async(host, self.pointer, _stream(stream))

    def copy(self, source: int, nbytes: int, stream: Stream) -> None:
        with self._device.current():
            cuda.memcpy_dtod_async(self.pointer, source, nbytes, _stream(stream))


class PycudaDevice(Device):
    library = "pycuda"

    def __init__(self, index: int) -> None:
        self.index = index
        self._device = cuda.Device(index)
        self._context = self._device.retain_primary_context()
        weakref.finalize(self, self._context.detach)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The context is a setting of each thread."""
        self._context.push()
        try:
            yield
        except cuda.Error as error:
            raise BackendError(f"CUDA failed: {error}") from error
        finally:
            self._context.pop()

    def gpu(self) -> Gpu:
        major, minor = self._device.compute_capability()
        return Gpu(name=self._device.name(), compute_capability=f"{major}.{minor}", driver=driver_version())

    def active(self) -> AbstractContextManager[None]:
        return self.current()

    def memory(self) -> tuple[int, int]:
        with self.current():
            free, total = cuda.mem_get_info()
        return free, total

    def allocate(self, nbytes: int) -> Memory:
        try:
            with self.current():
                return PycudaMemory(self, max(nbytes, 1))
        except BackendError as error:
            if isinstance(error.__cause__, cuda.MemoryError):
                raise DeviceMemoryError(nbytes, *self.memory()) from error
            raise

    def pinned(self, nbytes: int) -> np.ndarray:
        with self.current():
            array: np.ndarray = cuda.pagelocked_empty(max(nbytes, 1), np.uint8)
        return array

    def stream(self) -> Stream:
        with self.current():
            return PycudaStream(self)

    def wait_for(self, handle: int, stream: Stream) -> None:
        with self.current():
            self._context.synchronize()

    def event(self, *, timed: bool = False) -> Event:
        with self.current():
            return PycudaEvent(self, timed=timed)

    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        raise BackendError("pycuda has no CUDA graphs: install cuda-python, or import torch first")


def _stream(stream: Stream) -> Any:
    assert isinstance(stream, PycudaStream)
    return stream.stream


def open_device(index: int) -> Device:
    try:
        cuda.init()
        count = cuda.Device.count()
    except cuda.Error as error:
        raise BackendError(f"CUDA cannot start: {error}") from error
    if index >= count:
        raise BackendError(f"there is no cuda:{index}: CUDA sees {count} devices")
    return PycudaDevice(index)
