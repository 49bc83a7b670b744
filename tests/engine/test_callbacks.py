"""What TensorRT calls during a run; its base classes and the GPU's memory stand for the real ones."""

from types import SimpleNamespace
from typing import Any

import pytest

from deploy.engine.callbacks import make_allocator, make_profiler
from deploy.engine.cuda import DeviceMemoryError

STREAM: Any = object()
TRT: Any = SimpleNamespace(IOutputAllocator=object, IProfiler=object)


class Gpu:
    def __init__(self, room: int) -> None:
        self.room = room
        self.given: list[Any] = []
        self.streams: set[object] = set()

    def allocate(self, nbytes: int, stream: object) -> Any:
        self.streams.add(stream)
        if nbytes > self.room:
            raise DeviceMemoryError(nbytes, self.room, self.room)
        self.given.append(SimpleNamespace(pointer=4096 * (1 + len(self.given)), nbytes=nbytes))
        return self.given[-1]


def test_memory_of_an_output_grows_and_is_kept_for_the_next_run() -> None:
    gpu: Any = Gpu(1000)
    allocator = make_allocator(TRT, gpu, STREAM)
    small = allocator.reallocate_output_async("y", 0, 100, 256, 1)
    assert allocator.reallocate_output_async("y", small, 80, 256, 1) == small  # it fits
    large = allocator.reallocate_output_async("y", small, 400, 256, 1)
    assert large != small
    allocator.notify_shape("y", [10, 10])
    assert (allocator.memory.pointer, allocator.memory.nbytes, allocator.shape) == (large, 400, (10, 10))
    assert allocator.reallocate_output_async("y", 0, 100, 256, 1) == large
    assert gpu.streams == {STREAM}


@pytest.mark.parametrize("before", [0, 500])
def test_where_there_is_no_memory_the_run_fails_without_an_exception_and_the_reason_is_kept(before: int) -> None:
    gpu: Any = Gpu(1000)
    allocator = make_allocator(TRT, gpu, STREAM)
    if before:
        assert allocator.reallocate_output_async("y", 0, before, 256, 1)
    assert allocator.error is None
    assert allocator.reallocate_output_async("y", 0, 2000, 256, 1) == 0
    assert isinstance(allocator.error, DeviceMemoryError)
    assert allocator.reallocate_output_async("y", 0, 700, 256, 1)
    assert allocator.error is None


def test_times_of_all_runs_are_kept_by_layer() -> None:
    profiler = make_profiler(TRT)
    for ms in (1.0, 2.0):
        profiler.report_layer_time("conv", ms)
        profiler.report_layer_time("relu", ms / 10)
    assert profiler.times == {"conv": [1.0, 2.0], "relu": [0.1, 0.2]}
