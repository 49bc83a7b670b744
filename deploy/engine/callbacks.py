"""Objects that TensorRT calls back during a run: the memory of outputs, and the time of layers.

Their base classes come from the flavour's module, so each is defined in a function that takes the module.
"""

from collections.abc import Sequence
from typing import Any

from deploy.engine.bindings import Bindings
from deploy.engine.cuda import Device, Memory, Stream
from deploy.errors import BackendError


def make_allocator(trt: Bindings, device: Device, own: Stream) -> Any:
    """An IOutputAllocator for one output whose shape depends on data, with memory that belongs to the stream of its context.

    After a run, `memory` and `shape` are those of the output, until the next run; `error` says why there was no memory, if so.
    """

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.memory: Memory | None = None
            self.shape: tuple[int, ...] = ()
            self.error: BackendError | None = None

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            self.error = None
            if self.memory is None or self.memory.nbytes < size:
                try:
                    self.memory = None  # freed first: there may be no room for both
                    self.memory = device.allocate(size, own)
                except BackendError as error:
                    self.error = error
                    return 0  # an exception would not get through TensorRT: 0 makes the run fail
            return self.memory.pointer

        def notify_shape(self, name: str, shape: Sequence[int]) -> None:
            self.shape = tuple(shape)

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
