"""Rules of device memory."""

from __future__ import annotations

from tests.simulator.rules.probe import Here, probe

ORDERED = "CUDA C++ Programming Guide, Stream Ordered Memory Allocator"


@probe("runtime", ORDERED)
def memory_freed_in_the_order_of_a_stream_is_handed_on_at_once_in_that_order(here: Here) -> None:
    a = here.stream()
    here.prepare()
    here.busy(a)
    first = int(here.do("cudaMallocAsync", 1 << 20, a))
    here.set(first, 1, a)
    here.do("cudaFreeAsync", first, a)
    assert int(here.do("cudaMallocAsync", 1 << 20, a)) == first


@probe("runtime", ORDERED)
def memory_freed_in_the_order_of_a_stream_is_intact_until_then(here: Here) -> None:
    a, b, kept = here.stream(), here.stream(), here.memory()
    here.prepare()
    here.busy(a)
    first = int(here.do("cudaMallocAsync", 1 << 20, a))
    here.set(first, 1, a)
    here.busy(a)
    here.do("cudaMemcpyAsync", kept, first, 64, here.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice, a)
    here.do("cudaFreeAsync", first, a)
    second = int(here.do("cudaMallocAsync", 1 << 20, b))
    here.set(second, 2, b)
    assert here.read(second, b) == 2
    assert here.read(kept, a) == 1


@probe("runtime", ORDERED)
def memory_can_be_freed_on_another_stream_that_waits(here: Here) -> None:
    a, event, kept = here.stream(), here.event(), here.memory()
    here.prepare()
    first = int(here.do("cudaMallocAsync", 1 << 20, a))
    here.busy(a)
    here.set(first, 1, a)
    here.do("cudaMemcpyAsync", kept, first, 64, here.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice, a)
    here.do("cudaEventRecord", event, a)
    here.do("cudaStreamWaitEvent", 1, event, 0)
    here.do("cudaFreeAsync", first, 1)
    assert here.read(kept, 1) == 1


@probe("runtime", ORDERED)
def a_pool_of_ones_own_hands_on_what_was_freed(here: Here) -> None:
    names, properties, place = here.cudart, here.cudart.cudaMemPoolProps(), here.cudart.cudaMemLocation()
    properties.allocType = names.cudaMemAllocationType.cudaMemAllocationTypePinned
    place.type, place.id = names.cudaMemLocationType.cudaMemLocationTypeDevice, 0
    properties.location = place
    pool, a = here.do("cudaMemPoolCreate", properties), here.stream()
    first = int(here.do("cudaMallocFromPoolAsync", 1 << 20, pool, a))
    here.set(first, 1, a)
    here.do("cudaFreeAsync", first, a)
    assert int(here.do("cudaMallocFromPoolAsync", 1 << 20, pool, a)) == first


@probe("runtime", "CUDA C++ Best Practices Guide; cudaFree waits for the work of its device")
def to_free_is_to_wait_for_the_device(here: Here) -> None:
    a, event, other = here.stream(), here.event(), here.memory()
    here.prepare()
    here.busy(a)
    here.do("cudaEventRecord", event, a)
    here.do("cudaFree", other)
    assert here.ask("cudaEventQuery", event).name == "cudaSuccess"


@probe("runtime", "cuda_runtime_api.h: cudaMalloc")
def to_run_out_of_memory_harms_nothing_else(here: Here) -> None:
    pointer, a = here.memory(5), here.stream()
    _, total = here.cudart.cudaMemGetInfo()[1:]
    assert here.ask("cudaMalloc", 2 * total).name == "cudaErrorMemoryAllocation"
    assert here.ask("cudaMallocAsync", 2 * total, a).name == "cudaErrorMemoryAllocation"
    assert here.read(pointer, a) == 5


@probe("runtime", "cuda_runtime_api.h: cudaFree, cudaFreeHost")
def memory_is_freed_as_it_was_allocated(here: Here) -> None:
    pointer, host = here.memory(), here.pinned().ctypes.data
    assert here.ask("cudaFree", pointer + 16).name == "cudaErrorInvalidValue"
    assert here.ask("cudaFree", host).name == "cudaErrorInvalidValue"
    assert here.ask("cudaFreeHost", pointer).name == "cudaErrorInvalidValue"


@probe("runtime", "cuda_runtime_api.h: cudaPointerGetAttributes")
def a_pointer_tells_whose_it_is(here: Here) -> None:
    kinds = here.cudart.cudaMemoryType
    pointer, host = here.memory(), here.pinned()
    found = here.do("cudaPointerGetAttributes", pointer)
    assert (found.type, found.device) == (kinds.cudaMemoryTypeDevice, 0)
    assert here.do("cudaPointerGetAttributes", host.ctypes.data).type == kinds.cudaMemoryTypeHost


@probe("runtime", "cuda_runtime_api.h: cudaMalloc")
def addresses_are_aligned_to_256_bytes(here: Here) -> None:
    a = here.stream()
    for size in (1, 3, 257, 1000):
        assert int(here.do("cudaMalloc", size)) % 256 == 0
        assert int(here.do("cudaMallocAsync", size, a)) % 256 == 0
