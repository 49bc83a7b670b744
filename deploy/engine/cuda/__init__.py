"""What the TensorRT runtime needs of CUDA, through whichever library is there: torch, cuda-python or pycuda.

One file a library, each with `open_device(index: int) -> Device`; importing it raises ImportError where the library is
not installed. Everything is asynchronous but what says that it waits.
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
"""By name, the modules of this package, in the order in which they are tried."""


class DeviceMemoryError(BackendError):
    """No room on the GPU. `needed`, `free` and `total` are bytes."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(f"out of GPU memory: {_mib(needed)} needed, {_mib(free)} of {_mib(total)} free")
        self.needed = needed
        self.free = free
        self.total = total


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU: name, compute capability (`"9.0"`) and the version of the driver as nvidia-smi tells it, None if unknown."""

    name: str
    compute_capability: str
    driver: str | None


class Stream(ABC):
    """Work in order. `handle` is its `cudaStream_t`."""

    handle: int

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work is done."""


class Event(ABC):
    """A place in a stream."""

    @abstractmethod
    def record(self, stream: Stream) -> None:
        """Be at the end of what `stream` has been given so far."""

    @abstractmethod
    def hold(self, stream: Stream) -> None:
        """Let `stream` wait until this place is reached; nothing where the event was never recorded."""

    @abstractmethod
    def since(self, earlier: "Event") -> float:
        """Milliseconds from `earlier` to this: both were made `timed`, and have been reached."""


class Memory(ABC):
    """Device memory, freed when nothing refers to it any longer: `nbytes` from `pointer`."""

    pointer: int
    nbytes: int

    @abstractmethod
    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None:
        """Copy pinned bytes (n,) uint8 to the memory from `offset` on; they must stay as they are until it is done."""

    @abstractmethod
    def read(self, host: np.ndarray, stream: Stream) -> None:
        """Copy the first bytes to pinned memory (n,) uint8."""

    @abstractmethod
    def copy(self, source: int, nbytes: int, stream: Stream) -> None:
        """Copy `nbytes` from the device pointer `source` to the first bytes."""


class Graph(ABC):
    """Captured work, which can be launched again and again."""

    @abstractmethod
    def launch(self, stream: Stream) -> None:
        """Give the work to `stream` once more."""


class Device(ABC):
    """One GPU, numbered `index`. Raises BackendError where CUDA fails, DeviceMemoryError where memory is out."""

    library: ClassVar[str]
    index: int

    @abstractmethod
    def gpu(self) -> Gpu: ...

    @abstractmethod
    def active(self) -> AbstractContextManager[object]:
        """Makes this the GPU of the calling thread, and puts back the one before: what TensorRT is given runs on that one."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and in all."""

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
        """Let `stream` wait for what the stream `handle` of another library has been given so far."""

    @abstractmethod
    def event(self, *, timed: bool = False) -> Event:
        """timed: one that `since` can be asked of, which takes longer to record."""

    @abstractmethod
    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        """Record what `work` gives to `stream`, which is not run. Raises BackendError where it cannot be captured."""


def open_device(index: int = 0) -> Device:
    """GPU `index` through torch where the program has imported it, else through the first of LIBRARIES that is installed.

    torch, which takes seconds to import, is the last then. Raises BackendError where no library can use a GPU, with what
    each of them says.
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
