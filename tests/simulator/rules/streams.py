"""Rules of streams, events and copies."""

from __future__ import annotations

import numpy as np

from tests.simulator.rules.probe import Here, probe

STREAMS = "CUDA C++ Programming Guide, Asynchronous Concurrent Execution: Streams"
IMPLICIT = "CUDA Runtime API, Stream synchronization behavior"
EVENTS = "cuda_runtime_api.h: cudaEventRecord, cudaStreamWaitEvent"
COPIES = "CUDA Runtime API, API synchronization behavior: Memcpy"


@probe("runtime", STREAMS)
def work_of_one_stream_is_done_in_order(here: Here) -> None:
    pointer, a = here.memory(), here.stream()
    here.prepare()
    here.busy(a)
    here.set(pointer, 1, a)
    here.set(pointer, 2, a)
    assert here.read(pointer, a) == 2


@probe("runtime", STREAMS)
def two_streams_are_not_ordered(here: Here) -> None:
    pointer, a, b = here.memory(), here.stream(), here.stream()
    here.prepare()
    here.busy(a)
    here.set(pointer, 1, a)
    assert here.stale(lambda: here.read(pointer, b), old=0)


@probe("runtime", EVENTS)
def an_event_orders_two_streams(here: Here) -> None:
    pointer, a, b, event = here.memory(), here.stream(), here.stream(), here.event()
    here.prepare()
    here.busy(a)
    here.set(pointer, 1, a)
    here.do("cudaEventRecord", event, a)
    here.do("cudaStreamWaitEvent", b, event, 0)
    assert here.read(pointer, b) == 1


@probe("runtime", EVENTS)
def an_event_marks_the_work_given_before_it_was_recorded(here: Here) -> None:
    pointer, a, b, event = here.memory(), here.stream(), here.stream(), here.event()
    here.prepare()
    here.do("cudaEventRecord", event, a)
    here.busy(a)
    here.set(pointer, 1, a)
    here.do("cudaStreamWaitEvent", b, event, 0)
    assert here.stale(lambda: here.read(pointer, b), old=0)


@probe("runtime", EVENTS)
def a_wait_is_for_the_last_record_before_the_wait(here: Here) -> None:
    pointer, a, b, event = here.memory(), here.stream(), here.stream(), here.event()
    here.prepare()
    here.do("cudaEventRecord", event, a)
    here.do("cudaStreamWaitEvent", b, event, 0)
    here.busy(a)
    here.set(pointer, 1, a)
    here.do("cudaEventRecord", event, a)  # too late for the wait
    assert here.stale(lambda: here.read(pointer, b), old=0)


@probe("runtime", EVENTS)
def to_wait_for_an_event_that_was_never_recorded_does_nothing(here: Here) -> None:
    pointer, a, event = here.memory(3), here.stream(), here.event()
    here.do("cudaStreamWaitEvent", a, event, 0)
    assert here.read(pointer, a) == 3
    assert here.ask("cudaEventQuery", event).name == "cudaSuccess"


@probe("runtime", IMPLICIT)
def a_stream_that_blocks_waits_for_the_legacy_stream(here: Here) -> None:
    pointer, a = here.memory(), here.stream(blocking=True)
    here.prepare()
    here.busy(0)
    here.set(pointer, 1, 0)
    assert here.read(pointer, a) == 1


@probe("runtime", IMPLICIT)
def the_legacy_stream_waits_for_streams_that_block(here: Here) -> None:
    pointer, a = here.memory(), here.stream(blocking=True)
    here.prepare()
    here.busy(a)
    here.set(pointer, 1, a)
    assert here.read(pointer, 0) == 1


@probe("runtime", IMPLICIT)
def a_stream_that_does_not_block_does_not_wait_for_the_legacy_stream(here: Here) -> None:
    pointer, a = here.memory(), here.stream()
    here.prepare()
    here.busy(0)
    here.set(pointer, 1, 0)
    assert here.stale(lambda: here.read(pointer, a), old=0)


@probe("runtime", "driver_types.h: cudaStreamLegacy")
def handle_1_is_the_legacy_stream_as_0_is(here: Here) -> None:
    pointer = here.memory()
    here.prepare()
    here.busy(0)
    here.set(pointer, 1, 0)
    assert here.read(pointer, 1) == 1
    here.busy(1)
    here.set(pointer, 2, 1)
    assert here.read(pointer, 0) == 2


@probe("runtime", IMPLICIT)
def handle_2_is_a_stream_that_blocks(here: Here) -> None:
    pointer = here.memory()
    here.prepare()
    here.busy(0)
    here.set(pointer, 1, 0)
    assert here.read(pointer, 2) == 1


@probe("runtime", IMPLICIT)
def handle_2_is_another_stream_in_another_thread(here: Here) -> None:
    pointer = here.memory()
    here.prepare()
    here.busy(2)
    here.set(pointer, 1, 2)
    assert here.elsewhere(lambda: here.stale(lambda: here.read(pointer, 2), old=0))


@probe("runtime", "cuda_runtime_api.h: cudaStreamSynchronize")
def to_wait_for_a_stream_is_not_to_wait_for_others(here: Here) -> None:
    pointer, a, b = here.memory(), here.stream(), here.stream()
    here.prepare()
    here.busy(a)
    here.set(pointer, 1, a)
    here.do("cudaStreamSynchronize", b)
    assert here.stale(lambda: here.read(pointer, b), old=0)
    here.do("cudaStreamSynchronize", a)
    assert here.read(pointer, b) == 1


@probe("runtime", "cuda_runtime_api.h: cudaEventQuery")
def an_event_is_not_ready_before_its_work_is_done(here: Here) -> None:
    a, event = here.stream(), here.event()
    here.prepare()
    here.busy(a)
    here.do("cudaEventRecord", event, a)
    assert here.ask("cudaEventQuery", event).name == "cudaErrorNotReady"
    here.do("cudaEventSynchronize", event)
    assert here.ask("cudaEventQuery", event).name == "cudaSuccess"


@probe("runtime", "cuda_runtime_api.h: cudaEventElapsedTime")
def times_are_told_between_timed_events_that_were_reached(here: Here) -> None:
    a = here.stream()
    first, second, plain = here.event(timed=True), here.event(timed=True), here.event()
    here.prepare()
    here.do("cudaEventRecord", first, a)
    here.busy(a)
    here.do("cudaEventRecord", second, a)
    here.do("cudaEventRecord", plain, a)
    assert here.ask("cudaEventElapsedTime", first, second).name == "cudaErrorNotReady"
    here.do("cudaStreamSynchronize", a)
    assert here.do("cudaEventElapsedTime", first, second) > 0
    assert here.ask("cudaEventElapsedTime", first, plain).name == "cudaErrorInvalidResourceHandle"


@probe("runtime", "cuda_runtime_api.h: cudaStreamQuery")
def a_stream_is_not_ready_before_its_work_is_done(here: Here) -> None:
    a = here.stream()
    here.prepare()
    assert here.ask("cudaStreamQuery", a).name == "cudaSuccess"
    here.busy(a)
    assert here.ask("cudaStreamQuery", a).name == "cudaErrorNotReady"
    here.do("cudaStreamSynchronize", a)
    assert here.ask("cudaStreamQuery", a).name == "cudaSuccess"


@probe("runtime", "cuda_runtime_api.h: cudaSetDevice; CUDA C++ Programming Guide, Multi-Device System: Stream and Event Behavior")
def events_are_recorded_on_streams_of_their_gpu(here: Here) -> None:
    count = here.do("cudaGetDeviceCount")
    assert here.ask("cudaSetDevice", count).name == "cudaErrorInvalidDevice"
    if count < 2:
        return
    event = here.event()
    here.do("cudaSetDevice", 1)
    other = here.stream()
    assert here.ask("cudaEventRecord", event, other).name == "cudaErrorInvalidResourceHandle"
    here.do("cudaSetDevice", 0)


@probe("runtime", "cuda_runtime_api.h: cudaStreamDestroy")
def work_on_a_stream_that_is_destroyed_is_done_all_the_same(here: Here) -> None:
    pointer, a, b = here.memory(), here.stream(), here.stream()
    here.prepare()
    here.busy(a)
    here.set(pointer, 1, a)
    here.do("cudaStreamDestroy", a)
    here.do("cudaDeviceSynchronize")
    assert here.read(pointer, b) == 1


@probe("runtime", COPIES)
def pageable_memory_is_taken_before_the_copy_to_the_device_returns(here: Here) -> None:
    pointer, a, host = here.memory(), here.stream(), np.full(64, 7, np.uint8)
    here.prepare()
    here.busy(a)
    here.do("cudaMemcpyAsync", pointer, host.ctypes.data, 64, here.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, a)
    host[:] = 9
    assert here.read(pointer, a) == 7


@probe("runtime", COPIES)
def a_copy_to_pageable_memory_returns_when_it_is_done(here: Here) -> None:
    pointer, a, host = here.memory(), here.stream(), np.zeros(64, np.uint8)
    here.prepare()
    here.busy(a)
    here.set(pointer, 7, a)
    here.do("cudaMemcpyAsync", host.ctypes.data, pointer, 64, here.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost, a)
    assert host[0] == 7


@probe("runtime", COPIES)
def pinned_memory_is_read_when_the_copy_is_done_and_not_before(here: Here) -> None:
    pointer, a, host = here.memory(), here.stream(), here.pinned(7)
    here.prepare()
    here.busy(a)
    here.do("cudaMemcpyAsync", pointer, host.ctypes.data, 64, here.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, a)
    host[:] = 9
    assert here.stale(lambda: here.read(pointer, a), old=9)


@probe("runtime", COPIES)
def a_copy_to_pinned_memory_returns_before_it_is_done(here: Here) -> None:
    pointer, a, host = here.memory(7), here.stream(), here.pinned(1)
    here.prepare()
    here.busy(a)
    here.do("cudaMemcpyAsync", host.ctypes.data, pointer, 64, here.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost, a)
    assert host[0] != 7
    here.do("cudaStreamSynchronize", a)
    assert host[0] == 7
