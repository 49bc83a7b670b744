"""The part of CUDA that the TensorRT runtime needs, through an installed library: torch, cuda-python or pycuda.

Each library has a file with `open_device(index: int) -> Device`, whose import raises ImportError if the library is missing.
Everything is asynchronous except for functions that are documented to wait.
"""

import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from deploy.errors import BackendError

LIBRARIES = {"torch": "torch_device", "cuda-python": "cuda_python", "pycuda": "pycuda_device"}
"""The modules of this package by the name of the library, in the order in which they are tried."""


class DeviceMemoryError(BackendError):
    """No room on the GPU. `needed`, `free` and `total` are bytes."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(f"out of GPU memory: {_mib(needed)} needed, {_mib(free)} of {_mib(total)} free")
        self.needed = needed
        self.free = free
        self.total = total


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU: its name, its compute capability (`"9.0"`) and the driver version that nvidia-smi reports, None if unknown."""

    name: str
    compute_capability: str
    driver: str | None


class Stream(ABC):
    """A queue of work, done in order. `handle` is its `cudaStream_t`."""

    handle: int

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work is done."""


class Event(ABC):
    """A place in a stream."""

    @abstractmethod
    def record(self, stream: Stream) -> None:
        """Mark the end of the work that `stream` has been given so far."""

    @abstractmethod
    def hold(self, stream: Stream) -> None:
        """Let `stream` wait until this place is reached; no effect if the event was never recorded."""

    @abstractmethod
    def since(self, earlier: "Event") -> float:
        """Milliseconds from `earlier` to this event: both must be `timed`, and have been reached."""


class Memory(ABC):
    """Device memory, `nbytes` from `pointer`; freed when nothing refers to it any longer."""

    pointer: int
    nbytes: int

    @abstractmethod
    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None:
        """Copy pinned bytes (n,) uint8 to the memory from `offset` on; they must not change until the copy is done."""

    @abstractmethod
    def read(self, host: np.ndarray, stream: Stream) -> None:
        """Copy the first bytes to pinned memory (n,) uint8."""

    @abstractmethod
    def copy(self, source: int, nbytes: int, stream: Stream) -> None:
        """Copy `nbytes` from the device pointer `source` to the first bytes."""


class Graph(ABC):
    """Captured work, which can be launched any number of times."""

    @abstractmethod
    def launch(self, stream: Stream) -> None:
        """Queue the work on `stream` once more."""


class Device(ABC):
    """The GPU with the number `index`. Raises BackendError if CUDA fails, DeviceMemoryError if there is no memory left."""

    library: ClassVar[str]
    index: int

    @abstractmethod
    def gpu(self) -> Gpu: ...

    @abstractmethod
    def active(self) -> AbstractContextManager[object]:
        """Makes this the GPU of the calling thread, on which TensorRT runs its work, and restores the one before."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """The bytes of device memory that are free, and in total."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Memory: ...

    def output(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Memory:
        """Memory for an array."""
        return self.allocate(math.prod(shape) * dtype.itemsize)

    @abstractmethod
    def pinned(self, nbytes: int) -> np.ndarray:
        """Page-locked host memory (nbytes,) uint8, freed with the array."""

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream that does not wait for the default one."""

    @abstractmethod
    def wait_for(self, handle: int, stream: Stream) -> None:
        """Let `stream` wait for the work that the stream `handle` of another library has been given so far."""

    @abstractmethod
    def event(self, *, timed: bool = False) -> Event:
        """A new event. timed: `since` works on it, and recording it takes longer."""

    @abstractmethod
    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        """Record, without running it, the work that `work` queues on `stream`. Raises BackendError if it cannot be captured."""


def open_device(index: int = 0) -> Device:
    """Open a GPU, through torch if the program has imported it, else through the first of LIBRARIES that is installed.

    torch is then tried last, because it takes seconds to import. Raises BackendError with the reason of every library if none can
    use the GPU.
    """
    order = list(LIBRARIES)
    if sys.modules.get("torch") is None:
        order.append(order.pop(order.index("torch")))
    reasons = []
    for library in order:
        try:
            return _open(LIBRARIES[library], index)
        except (ImportError, BackendError) as error:
            reasons.append(f"{library}: {error}")
    raise BackendError(f"no library can use GPU {index} here: {'; '.join(reasons)}; see `deploy doctor`")


def _open(module: str, index: int) -> Device:
    loaded: Any = importlib.import_module(f"deploy.engine.cuda.{module}")
    device: Device = loaded.open_device(index)
    return device


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
