"""CUDA through torch: memory comes from its caching allocator, so that the program and the engine share it."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from deploy.engine.cuda import Device, DeviceMemoryError, Event, Gpu, Graph, Memory, Stream
from deploy.engine.cuda.arrays import DeviceArray
from deploy.engine.cuda.driver import driver_version
from deploy.errors import BackendError

_DTYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(name): getattr(torch, name)
    for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
}


class TorchStream(Stream):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.handle = stream.cuda_stream

    def synchronize(self) -> None:
        self.stream.synchronize()


class TorchEvent(Event):
    def __init__(self, *, timed: bool = False) -> None:
        self._event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]

    def record(self, stream: Stream) -> None:
        self._event.record(_stream(stream))

    def hold(self, stream: Stream) -> None:
        _stream(stream).wait_event(self._event)

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, TorchEvent)
        return float(earlier._event.elapsed_time(self._event))


class TorchMemory(Memory):
    """The memory of a contiguous `tensor`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.pointer = tensor.data_ptr()
        self.nbytes = tensor.nbytes

    def _bytes(self, start: int, count: int) -> torch.Tensor:
        """`count` bytes from `start` on, (count,) uint8."""
        whole = self.tensor if self.tensor.dtype == torch.uint8 else self.tensor.view(-1).view(torch.uint8)
        return whole[start : start + count]

    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None:
        with torch.cuda.stream(_stream(stream)):
            self._bytes(offset, host.size).copy_(torch.from_numpy(host), non_blocking=True)

    def read(self, host: np.ndarray, stream: Stream) -> None:
        with torch.cuda.stream(_stream(stream)):
            torch.from_numpy(host).copy_(self._bytes(0, host.size), non_blocking=True)

    def copy(self, source: int, nbytes: int, stream: Stream) -> None:
        with torch.cuda.stream(_stream(stream)):
            self._bytes(0, nbytes).copy_(torch.as_tensor(_Bytes(source, nbytes), device=self.tensor.device), non_blocking=True)


class TorchGraph(Graph):
    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def launch(self, stream: Stream) -> None:
        with torch.cuda.stream(_stream(stream)):
            self._graph.replay()


class _Bytes:
    """Memory at a pointer, in a form that torch can wrap."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"data": (pointer, False), "shape": (nbytes,), "typestr": "|u1", "version": 2}


class TorchDevice(Device):
    library = "torch"

    def __init__(self, index: int) -> None:
        self.index = index
        self.device = torch.device("cuda", index)

    def gpu(self) -> Gpu:
        major, minor = torch.cuda.get_device_capability(self.device)
        name = torch.cuda.get_device_name(self.device)
        return Gpu(name=name, compute_capability=f"{major}.{minor}", driver=driver_version())

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.index)

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.device)
        return free, total

    def allocate(self, nbytes: int) -> Memory:
        try:
            return TorchMemory(torch.empty(max(nbytes, 1), dtype=torch.uint8, device=self.device))
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceMemoryError(nbytes, *self.memory()) from error

    def output(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Memory:
        if 0 in shape:
            return self.allocate(0)  # an engine needs an address even for an empty array
        try:
            return TorchMemory(torch.empty(shape, dtype=_DTYPES[dtype], device=self.device))
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceMemoryError(math.prod(shape) * dtype.itemsize, *self.memory()) from error

    def pinned(self, nbytes: int) -> np.ndarray:
        try:
            array: np.ndarray = torch.empty(max(nbytes, 1), dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError as error:
            raise BackendError(f"cannot lock {nbytes} bytes of host memory: {error}") from error
        return array

    def stream(self) -> Stream:
        return TorchStream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]

    def wait_for(self, handle: int, stream: Stream) -> None:
        other = torch.cuda.ExternalStream(handle, self.device)  # type: ignore[no-untyped-call]
        _stream(stream).wait_stream(other)

    def current(self) -> TorchStream:
        """The stream that the caller's torch code runs on."""
        return TorchStream(torch.cuda.current_stream(self.index))

    def event(self, *, timed: bool = False) -> Event:
        return TorchEvent(timed=timed)

    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads of the program may use CUDA meanwhile.
            with torch.cuda.graph(graph, stream=_stream(stream), capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            raise BackendError(f"the work cannot be captured in a CUDA graph: {error}") from error
        return TorchGraph(graph)


def _stream(stream: Stream) -> torch.cuda.Stream:
    assert isinstance(stream, TorchStream)
    return stream.stream


def open_device(index: int) -> Device:
    if not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} can use no CUDA device")
    if index >= torch.cuda.device_count():
        raise BackendError(f"there is no cuda:{index}: torch sees {torch.cuda.device_count()} devices")
    return TorchDevice(index)


def as_tensor(memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
    """Memory that torch allocated, as a tensor."""
    assert isinstance(memory, TorchMemory)
    tensor = memory.tensor
    if tensor.dtype == _DTYPES[dtype] and tensor.shape == shape:
        return tensor
    count = math.prod(shape) * dtype.itemsize
    return tensor.view(-1).view(torch.uint8)[:count].view(_DTYPES[dtype]).view(shape)


def adopt(array: DeviceArray) -> torch.Tensor:
    """Memory that another library allocated, as a tensor."""
    return torch.as_tensor(array, device=torch.device("cuda", array.index))
