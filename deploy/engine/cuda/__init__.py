"""The part of CUDA that the TensorRT runtime needs, through an installed library: cuda-python or pycuda.

Each library has a file with `open_device(index: int) -> Device`, whose import raises ImportError if the library is missing. Both
work in the primary context of the GPU, which torch, CuPy and every other user of the CUDA runtime in the process share.

Everything is asynchronous except for functions that are documented to wait, and is called under `Device.active()`.
"""

import importlib
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from deploy.engine.cuda.capturing import capturing
from deploy.errors import BackendError

LIBRARIES = {"cuda-python": "cuda_python", "pycuda": "pycuda_device"}
"""The modules of this package by the name of the library, in the order in which they are tried."""

LEGACY = 1
"""The handle of the legacy default stream (`cudaStreamLegacy` of driver_types.h), which 0 also means."""


class DeviceMemoryError(BackendError):
    """No room on the GPU. `needed`, `free` and `total` are bytes."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(f"out of GPU memory: {_mib(needed)} needed, {_mib(free)} of {_mib(total)} free")
        self.needed = needed
        self.free = free
        self.total = total


class DeviceLostError(BackendError):
    """CUDA failed for good: it answers every later call of this process with the same error. `reason` is its text."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"this process has lost its GPU, and must be started anew: {reason}")
        self.reason = reason


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
    """Device memory, `nbytes` from `pointer`.

    It belongs to the stream that it was allocated for: other streams use it after what that one was given before the allocation,
    and it may be dropped once that one waits for all that they do with it.
    """

    pointer: int
    nbytes: int

    @abstractmethod
    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None:
        """Copy pinned bytes (n,) uint8 to the memory from `offset` on; they must not change until the copy is done."""

    @abstractmethod
    def read(self, host: np.ndarray, stream: Stream) -> None:
        """Copy the first bytes to pinned memory (n,) uint8."""


class Graph(ABC):
    """Captured work, which can be launched any number of times."""

    @abstractmethod
    def launch(self, stream: Stream) -> None:
        """Queue the work on `stream` once more."""


class Device(ABC):
    """The GPU with the number `index`. Raises BackendError if CUDA fails, DeviceMemoryError if there is no memory left.

    count: the number of GPUs that the process sees.
    """

    library: ClassVar[str]
    index: int
    count: int

    @abstractmethod
    def gpu(self) -> Gpu: ...

    @abstractmethod
    def active(self) -> AbstractContextManager[object]:
        """Makes this the GPU of the calling thread, on which TensorRT runs its work, and restores the one before."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """The bytes of device memory that are free, and in total."""

    @abstractmethod
    def allocate(self, nbytes: int, stream: Stream) -> Memory:
        """Memory that belongs to `stream`."""

    @abstractmethod
    def trim(self) -> None:
        """Give memory that is kept for later allocations, here and by torch, back to the GPU."""

    @abstractmethod
    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy `nbytes` of device memory from the address `source` to the address `target`."""

    @abstractmethod
    def owner(self, pointer: int) -> int | None:
        """The index of the GPU that has the memory at a device address; None if the library cannot tell."""

    @abstractmethod
    def pinned(self, nbytes: int) -> np.ndarray:
        """Page-locked host memory (nbytes,) uint8, freed with the array."""

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream that does not wait for the default one."""

    @abstractmethod
    def external(self, handle: int) -> Stream:
        """A stream of another library, or a default stream: 0 and 1 are the legacy one, 2 is that of the calling thread."""

    @abstractmethod
    def event(self, *, timed: bool = False) -> Event:
        """A new event. timed: `since` works on it, and recording it takes longer."""

    @abstractmethod
    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        """Record, without running it, the work that `work` queues on `stream`. Raises BackendError if it cannot be captured."""


def when_dropped(owner: object, function: Callable[..., object], *arguments: Any) -> None:
    """Call a function once nothing refers to `owner`; but not at the end of the process, when sessions need what they hold."""
    weakref.finalize(owner, function, *arguments).atexit = False


def open_device(index: int = 0) -> Device:
    """Open a GPU through the first of LIBRARIES that can. Raises BackendError with the reason of each if none can."""
    reasons = []
    for library, module in LIBRARIES.items():
        try:
            return _open(module, index)
        except (ImportError, BackendError) as error:
            reasons.append(f"{library}: {error}")
    raise BackendError(f"no library can use GPU {index} here: {'; '.join(reasons)}; see `deploy doctor`")


def _open(module: str, index: int) -> Device:
    loaded: Any = importlib.import_module(f"deploy.engine.cuda.{module}")
    device: Device = loaded.open_device(index)
    return device


def release_torch_cache() -> None:
    """Give the memory that torch keeps for its next tensors back to the GPU, where the program uses torch on one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with capturing:  # releasing memory ends a capture
            torch.cuda.empty_cache()


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
