"""What a probe is, and what it is given."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tests.simulator.errors import RuleError

MOST = 1 << 29
"""Bytes that `Here.busy` writes at a time; a real GPU needs some tenth of a millisecond for them."""


class Status(NamedTuple):
    """How a call of cuda-python's ended: the name of its `cudaError_t`, and its value."""

    name: str
    value: Any = None


class Here:
    """The libraries of a probe, real ones or the simulator's, and what many probes do with them."""

    def __init__(self, cudart: Any, torch: Any, trt: Any = None, make_plan: Callable[..., bytes] | None = None) -> None:
        self.cudart = cudart
        self.torch = torch
        self.trt = trt
        self.make_plan = make_plan
        self.found: list[RuleError] = []
        self._hog: int | None = None

    def ask(self, name: str, *args: Any) -> Status:
        """Call a function of cuda-python's that may fail."""
        status, *values = getattr(self.cudart, name)(*args)
        if status != self.cudart.cudaError_t.cudaSuccess:
            self.cudart.cudaGetLastError()
        return Status(status.name, values[0] if values else None)

    def do(self, name: str, *args: Any) -> Any:
        """Call a function that must not fail; its value."""
        found = self.ask(name, *args)
        assert found.name == "cudaSuccess", f"{name}: {found.name}"
        return found.value

    def stream(self, *, blocking: bool = False) -> int:
        flags = self.cudart.cudaStreamDefault if blocking else self.cudart.cudaStreamNonBlocking
        return int(self.do("cudaStreamCreateWithFlags", flags))

    def event(self, *, timed: bool = False) -> Any:
        return self.do("cudaEventCreateWithFlags", self.cudart.cudaEventDefault if timed else self.cudart.cudaEventDisableTiming)

    def memory(self, value: int = 0, nbytes: int = 64) -> int:
        """Device memory full of a value, which all streams see."""
        pointer = int(self.do("cudaMalloc", nbytes))
        self.do("cudaMemsetAsync", pointer, value, nbytes, 0)
        self.do("cudaDeviceSynchronize")
        return pointer

    def pinned(self, value: int = 0, nbytes: int = 64) -> np.ndarray:
        pointer = int(self.do("cudaHostAlloc", nbytes, self.cudart.cudaHostAllocDefault))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))
        array[:] = value
        return array

    def prepare(self) -> None:
        """Allocate what `busy` writes to, which nothing may be captured or pending for."""
        if self._hog is None:
            _, total = self.cudart.cudaMemGetInfo()[1:]
            self._size = min(MOST, total // 64)
            self._hog = int(self.do("cudaMalloc", self._size))
            self.do("cudaDeviceSynchronize")

    def busy(self, stream: int) -> None:
        """Give a stream work for some tens of milliseconds; on the simulator, any."""
        assert self._hog is not None, "call prepare first"
        for _ in range(400 if self._size == MOST else 1):
            self.do("cudaMemsetAsync", self._hog, 0, self._size, stream)

    def set(self, pointer: int, value: int, stream: int) -> None:
        self.do("cudaMemsetAsync", pointer, value, 64, stream)

    def read(self, pointer: int, stream: int) -> int:
        """The first byte, as the stream finds it."""
        host = np.full(64, 255, np.uint8)
        self.do("cudaMemcpyAsync", host.ctypes.data, pointer, 64, self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)
        self.do("cudaStreamSynchronize", stream)
        return int(host[0])

    def stale(self, read: Callable[[], int], old: int) -> bool:
        """Whether a read finds what was there before: nothing orders it after the write. The simulator says so instead."""
        try:
            return read() == old
        except RuleError as error:
            self.found.append(error)
            return "no ordering" in str(error) or "still to use" in str(error)

    def begin(self, stream: int, mode: str = "ThreadLocal") -> str:
        modes = self.cudart.cudaStreamCaptureMode
        return self.ask("cudaStreamBeginCapture", stream, getattr(modes, f"cudaStreamCaptureMode{mode}")).name

    def end(self, stream: int) -> Any:
        """End a capture that must be good: what can be launched."""
        graph = self.do("cudaStreamEndCapture", stream)
        made = self.do("cudaGraphInstantiate", graph, 0)
        self.do("cudaGraphDestroy", graph)
        return made

    def refused(self, call: Callable[[], Any]) -> str:
        """The message of the RuntimeError that a call of torch's must end in."""
        try:
            call()
        except RuntimeError as error:
            return str(error)
        raise AssertionError("it was not refused")

    def elsewhere(self, work: Callable[[], Any]) -> Any:
        """The result of `work` in another thread."""
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(work()))
        thread.start()
        thread.join(30)
        assert found, "the other thread failed"
        return found[0]


@dataclass(frozen=True)
class Probe:
    """source: where the rule is written."""

    name: str
    source: str
    run: Callable[[Here], None]
    library: str


PROBES: dict[str, Probe] = {}


def probe(library: str, source: str) -> Callable[[Callable[[Here], None]], Callable[[Here], None]]:
    """A probe that needs `runtime` (cuda-python), `torch` or `tensorrt`. It raises AssertionError where the rule does not hold."""

    def add(function: Callable[[Here], None]) -> Callable[[Here], None]:
        PROBES[function.__name__] = Probe(function.__name__, source, function, library)
        return function

    return add
