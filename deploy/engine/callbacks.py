"""Objects that TensorRT calls back during a run: the memory of outputs, and the time of layers.

Their base classes come from the flavour's module, so each is defined in a function that takes the module.
"""

from collections.abc import Sequence
from typing import Any

from deploy.engine.bindings import Bindings
from deploy.engine.cuda import Device, Memory
from deploy.errors import BackendError


def make_allocator(trt: Bindings, device: Device) -> Any:
    """An IOutputAllocator for one output whose shape depends on data. `take()` returns its memory and shape after a run."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._memory: Memory | None = None
            self._shape: tuple[int, ...] = ()

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            if self._memory is None or self._memory.nbytes < size:
                try:
                    self._memory = device.allocate(size)
                except BackendError:
                    return 0  # an exception would not get through TensorRT: 0 makes the run fail
            return self._memory.pointer

        def notify_shape(self, name: str, shape: Sequence[int]) -> None:
            self._shape = tuple(shape)

        def take(self) -> tuple[Memory, tuple[int, ...]]:
            memory, self._memory = self._memory, None  # the next output gets other memory
            assert memory is not None
            return memory, self._shape

    return Allocator()


def make_profiler(trt: Bindings) -> Any:
    """An IProfiler that collects the time of each layer: `times` holds the milliseconds of every run, by layer name."""

    class Profiler(trt.IProfiler):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    return Profiler()
