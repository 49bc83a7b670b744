"""Mistakes with streams, events and memory."""

from __future__ import annotations

import torch

from tests.simulator.faults.fault import Fixture, fault


@fault("no ordering: cudaMemsetAsync on stream")
def to_write_on_another_stream(f: Fixture) -> None:
    f.set(f.x, 1, f.stream())
    f.set(f.x, 2, f.stream())


@fault("which is written by cudaMemsetAsync on stream")
def to_read_on_another_stream(f: Fixture) -> None:
    f.set(f.x, 1, f.stream())
    f.read(f.x, f.stream())


@fault("which is read by cudaMemcpyAsync on stream")
def to_write_what_another_stream_reads(f: Fixture) -> None:
    a, kind = f.stream(), f.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    f.do("cudaMemcpyAsync", f.y, f.x, 64, kind, a)
    f.set(f.x, 1, f.stream())


@fault("no ordering")
def to_record_the_event_before_the_work(f: Fixture) -> None:
    a, b, event = f.stream(), f.stream(), f.event()
    f.do("cudaEventRecord", event, a)
    f.set(f.x, 1, a)
    f.do("cudaStreamWaitEvent", b, event, 0)
    f.read(f.x, b)


@fault("which is written by cudaMemsetAsync on the default stream of cuda:0")
def to_trust_that_the_default_stream_orders_all_streams(f: Fixture) -> None:
    f.set(f.x, 1, 0)
    f.read(f.x, f.stream())


@fault("it was destroyed, or never made")
def to_use_a_stream_that_was_destroyed(f: Fixture) -> None:
    a = f.stream()
    f.do("cudaStreamDestroy", a)
    f.set(f.x, 1, a)


@fault("there is no event")
def to_use_an_event_that_was_destroyed(f: Fixture) -> None:
    event = f.event()
    f.do("cudaEventDestroy", event)
    f.do("cudaEventRecord", event, 0)


@fault("was destroyed and is used")
def to_keep_a_stream_of_another_library_that_was_destroyed(f: Fixture) -> None:
    a = f.stream()
    kept = torch.cuda.ExternalStream(a)
    f.do("cudaStreamDestroy", a)
    with torch.cuda.stream(kept):
        torch.ones(4, device="cuda")


@fault("is destroyed while it is captured")
def to_destroy_a_stream_that_is_captured(f: Fixture) -> None:
    a = f.stream()
    f.begin(a)
    try:
        f.do("cudaStreamDestroy", a)
    finally:
        f.ask("cudaStreamEndCapture", a)


@fault("use after free: cudaMemsetAsync")
def to_use_memory_after_it_was_freed(f: Fixture) -> None:
    f.do("cudaFree", f.x)
    f.set(f.x, 1, 0)


@fault("beyond the 32 of cudaMalloc")
def to_write_beyond_the_end(f: Fixture) -> None:
    f.set(f.memory(0, 32), 1, 0)


@fault("which was never allocated")
def to_write_where_nothing_is(f: Fixture) -> None:
    f.set(4096, 1, 0)


@fault("cudaFreeAsync on stream")
def to_free_in_an_order_that_another_stream_does_not_keep(f: Fixture) -> None:
    a, b = f.stream(), f.stream()
    pointer = f.do("cudaMallocAsync", 64, a)
    f.do("cudaStreamSynchronize", a)
    f.set(pointer, 1, b)
    f.do("cudaFreeAsync", pointer, a)


@fault("which is written by cudaMallocAsync on stream")
def to_use_memory_on_a_stream_it_was_not_allocated_for(f: Fixture) -> None:
    f.set(f.do("cudaMallocAsync", 64, f.stream()), 1, f.stream())


@fault("the host changed pinned memory")
def to_change_pinned_memory_while_it_is_copied(f: Fixture) -> None:
    a, host = f.stream(), f.pinned(1)
    f.do("cudaMemcpyAsync", f.x, host.ctypes.data, 64, f.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, a)
    host[:] = 2
    f.do("cudaStreamSynchronize", a)


@fault("cudaFreeHost at")
def to_free_pinned_memory_while_it_is_copied(f: Fixture) -> None:
    host = f.pinned(1)
    f.do("cudaMemcpyAsync", f.x, host.ctypes.data, 64, f.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, f.stream())
    f.do("cudaFreeHost", host.ctypes.data)


@fault("uses memory of cuda:1")
def to_use_memory_of_another_gpu(f: Fixture) -> None:
    f.do("cudaSetDevice", 1)
    pointer = f.do("cudaMalloc", 64)
    f.do("cudaSetDevice", 0)
    f.set(pointer, 1, 0)


@fault("there is no memory pool")
def to_allocate_from_a_pool_that_was_destroyed(f: Fixture) -> None:
    names, properties = f.cudart, f.cudart.cudaMemPoolProps()
    properties.location.type = names.cudaMemLocationType.cudaMemLocationTypeDevice
    pool = f.do("cudaMemPoolCreate", properties)
    f.do("cudaMemPoolDestroy", pool)
    f.do("cudaMallocFromPoolAsync", 64, pool, f.stream())


@fault("which it is not")
def to_copy_in_another_direction_than_is_said(f: Fixture) -> None:
    host = f.pinned()
    f.do("cudaMemcpyAsync", f.x, host.ctypes.data, 64, f.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice, f.stream())


@fault("not modelled")
def to_allocate_in_a_capture(f: Fixture) -> None:
    a = f.stream()
    f.begin(a)
    try:
        f.do("cudaMallocAsync", 64, a)
    finally:
        f.ask("cudaStreamEndCapture", a)
