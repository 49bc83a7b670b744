"""`pycuda.driver` on the simulator. pycuda cannot be imported without a driver: its signatures are taken from its documentation.

Each object remembers the context that it was made in. It is freed in a thread in which that context is current, or in the thread
that opened the context; anywhere else it is leaked (`scoped_context_activation` in pycuda's src/cpp/cuda.hpp).
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from cuda.bindings import runtime

from tests.simulator.allocation import Allocator
from tests.simulator.errors import CudaError
from tests.simulator.machine import Machine
from tests.simulator.runtime_front import copy
from tests.simulator.work import LEGACY

_KIND = runtime.cudaMemcpyKind


class Error(Exception):
    """pycuda.driver.Error"""


class LogicError(Error):
    """pycuda.driver.LogicError"""


class MemoryError(Error):  # noqa: A001
    """pycuda.driver.MemoryError"""


class PycudaFront:
    """Stands for the module. leaked: what was dropped where its context could not be made current."""

    Error, LogicError, MemoryError = Error, LogicError, MemoryError
    event_flags = types.SimpleNamespace(DEFAULT=0, BLOCKING_SYNC=1, DISABLE_TIMING=2)

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.allocator = Allocator(machine)
        self.stacks = threading.local()
        self.leaked: list[str] = []
        front = self

        class Device:
            def __init__(self, number: int) -> None:
                self.number = number

            @staticmethod
            def count() -> int:
                return machine.devices

            def name(self) -> str:
                return "Simulated GPU"

            def compute_capability(self) -> tuple[int, int]:
                return (8, 9)

            def retain_primary_context(self) -> Context:
                return Context(front, self.number)

        class Bound(Context):
            """`Context.synchronize()` is static, and means the current one."""

            @staticmethod
            def synchronize() -> None:
                front.call("synchronize_device", lambda: machine.synchronize_device(front.current().device))

        self.Device = Device
        self.Context = Bound

    def init(self, flags: int = 0) -> None:
        pass

    def stack(self) -> list[Context]:
        found: list[Context] = self.stacks.__dict__.setdefault("contexts", [])
        return found

    def before(self) -> list[int]:
        """The GPUs that the thread had before each context of the stack."""
        found: list[int] = self.stacks.__dict__.setdefault("before", [])
        return found

    def current(self) -> Context:
        if not self.stack():
            raise LogicError("invalid device context - no currently active context?")
        return self.stack()[-1]

    def call(self, name: str, work: Callable[[], Any]) -> Any:
        context = self.current()
        try:
            with self.machine.inside(name):
                assert self.machine.here.device == context.device
                return work()
        except CudaError as error:
            kind = MemoryError if error.name == "cudaErrorMemoryAllocation" else LogicError
            raise kind(f"{name} failed: {error.name}") from None

    def mem_get_info(self) -> tuple[int, int]:
        space, device = self.machine.space, self.current().device
        return space.total - space.used.get(device, 0), space.total

    def mem_alloc(self, bytes: int) -> Held:  # noqa: A002
        owner = self.call("mem_alloc", lambda: self.allocator.malloc(bytes))
        return Held(self, owner.address, lambda: self.allocator.free(owner.address), owner.label)

    def pagelocked_empty(self, shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        owner = self.call("pagelocked_empty", lambda: self.allocator.malloc_host(nbytes))
        held = Held(self, owner.address, lambda: self.allocator.free_host(owner.address), owner.label)
        held.__array_interface__ = {"data": (owner.address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}
        view = np.asarray(held)
        return view.view(dtype).reshape(shape) if np.dtype(dtype) != np.uint8 else view

    def _copy(self, name: str, dest: int, src: int, size: int, kind: Any, stream: Any) -> None:
        inner = self.machine.legacy[self.current().device] if stream is None else stream.inner
        self.call(name, lambda: copy(self.machine, inner, int(dest), int(src), size, kind))

    def memcpy_htod_async(self, dest: Any, src: np.ndarray, stream: Any = None) -> None:
        self._copy("memcpy_htod_async", int(dest), src.ctypes.data, src.nbytes, _KIND.cudaMemcpyHostToDevice, stream)

    def memcpy_dtoh_async(self, dest: np.ndarray, src: Any, stream: Any = None) -> None:
        self._copy("memcpy_dtoh_async", dest.ctypes.data, int(src), dest.nbytes, _KIND.cudaMemcpyDeviceToHost, stream)

    def memcpy_dtod_async(self, dest: Any, src: Any, size: int, stream: Any = None) -> None:
        self._copy("memcpy_dtod_async", int(dest), int(src), size, _KIND.cudaMemcpyDeviceToDevice, stream)

    def Stream(self, flags: int = 0) -> Stream:
        return Stream(self, flags)

    def Event(self, flags: int = 0) -> Event:
        return Event(self, flags)


class Context:
    """A primary context. While it is on top of the thread's stack, its GPU is the thread's, for the runtime's calls too."""

    def __init__(self, front: PycudaFront, device: int) -> None:
        self.front, self.device, self.thread = front, device, threading.get_ident()

    def push(self) -> None:
        here = self.front.machine.here
        self.front.stack().append(self)
        self.front.before().append(here.device)
        here.device = self.device

    def pop(self) -> None:
        self.front.stack().pop()
        self.front.machine.here.device = self.front.before().pop()

    def detach(self) -> None:
        pass

    def get_device(self) -> Any:
        return self.front.Device(self.device)

    def synchronize(self) -> None:
        self.front.Context.synchronize()


class Held:
    """What a context holds for an object of pycuda: memory, a stream, an event."""

    def __init__(self, front: PycudaFront, handle: int, release: Callable[[], None], label: str) -> None:
        self._front, self._handle, self._label = front, handle, label
        self._release: Callable[[], None] | None = release
        self._context = front.current()
        self.__array_interface__: Any = None

    def __int__(self) -> int:
        return self._handle

    def free(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            self._front.call("free", release)

    def __del__(self) -> None:
        if getattr(self, "_release", None) is None:
            return
        stack = self._front.stack()
        if (stack and stack[-1].device == self._context.device) or threading.get_ident() == self._context.thread:
            context, front = self._context, self._front
            release: Callable[[], None] = self._release

            def drop() -> None:
                context.push()
                with suppress(Error):  # pycuda's destructors say so and go on
                    front.call("free", release)
                context.pop()

            self._front.machine.dropped.append(drop)
        else:
            self._front.leaked.append(self._label)


class Stream(Held):
    """pycuda.driver.Stream: it waits for the default stream, unless flags is CU_STREAM_NON_BLOCKING."""

    def __init__(self, front: PycudaFront, flags: int) -> None:
        machine = front.machine
        inner = self.inner = front.call("stream_create", lambda: machine.stream_create(blocking=not flags & 1))
        super().__init__(front, inner.handle, lambda: machine.stream_destroy(inner), inner.name)

    @property
    def handle(self) -> int:
        return int(self.inner.handle)

    def synchronize(self) -> None:
        self._front.call("stream_synchronize", lambda: self._front.machine.stream_synchronize(self.inner))

    def wait_for_event(self, event: Event) -> None:
        self._front.call("stream_wait_event", lambda: self._front.machine.stream_wait_event(self.inner, event.inner))


class Event(Held):
    """pycuda.driver.Event"""

    def __init__(self, front: PycudaFront, flags: int) -> None:
        machine = front.machine
        inner = self.inner = front.call("event_create", lambda: machine.event_create(timed=not flags & 2))
        super().__init__(front, inner.handle, lambda: machine.event_destroy(inner), "an event")

    def record(self, stream: Stream | None = None) -> None:
        machine = self._front.machine
        inner = machine.legacy[self._front.current().device] if stream is None else stream.inner
        assert stream is not None or inner.handle == LEGACY
        self._front.call("event_record", lambda: machine.event_record(self.inner, inner))

    def synchronize(self) -> None:
        self._front.call("event_synchronize", lambda: self._front.machine.event_synchronize(self.inner))

    def query(self) -> bool:
        return bool(self._front.call("event_query", lambda: self._front.machine.event_query(self.inner)))

    def time_till(self, event: Event) -> float:
        return float(self._front.call("event_elapsed", lambda: self._front.machine.event_elapsed(self.inner, event.inner)))

    def time_since(self, event: Event) -> float:
        return event.time_till(self)
