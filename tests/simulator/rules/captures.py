"""Rules of stream captures and graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.simulator.rules.probe import Here, Status, probe

GRAPHS = "CUDA C++ Programming Guide, CUDA Graphs: Creating a Graph Using Stream Capture"
FORBIDDEN = "CUDA C++ Programming Guide, CUDA Graphs: Prohibited and Unhandled Operations"
EVENTS = "CUDA C++ Programming Guide, CUDA Graphs: Cross-stream Dependencies and Events"
MODES = "cuda_runtime_api.h: cudaStreamBeginCapture, cudaThreadExchangeStreamCaptureMode"
CODES = "driver_types.h: cudaError"
SEEN = "seen on an NVIDIA H100, driver 580.159.04, CUDA 13.0"
INVALID = "cudaErrorStreamCaptureInvalidated"


def _invalid(here: Here, stream: int) -> None:
    """The capture is lost, which its end says, and the stream works on."""
    status = here.cudart.cudaStreamCaptureStatus
    assert here.do("cudaStreamIsCapturing", stream) == status.cudaStreamCaptureStatusInvalidated
    assert here.ask("cudaStreamEndCapture", stream).name == INVALID
    assert here.do("cudaStreamIsCapturing", stream) == status.cudaStreamCaptureStatusNone
    here.do("cudaStreamSynchronize", stream)


@probe("runtime", GRAPHS)
def captured_work_is_done_by_each_launch_and_not_before(here: Here) -> None:
    source, target, a = here.memory(1), here.memory(0), here.stream()
    assert here.begin(a) == "cudaSuccess"
    here.do("cudaMemcpyAsync", target, source, 64, here.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice, a)
    graph = here.end(a)
    assert here.read(target, a) == 0
    for value in (1, 2):
        here.set(source, value, a)
        here.do("cudaGraphLaunch", graph, a)
        assert here.read(target, a) == value


@probe("runtime", "cuda_runtime_api.h: cudaGraphLaunch")
def a_graph_can_be_launched_on_the_legacy_stream(here: Here) -> None:
    pointer, a = here.memory(), here.stream()
    here.begin(a)
    here.set(pointer, 4, a)
    graph = here.end(a)
    here.do("cudaGraphLaunch", graph, 0)
    assert here.read(pointer, 0) == 4


@probe("runtime", "cuda_runtime_api.h: cudaGraphLaunch")
def launches_of_one_graph_come_after_one_another(here: Here) -> None:
    pointer, a, b, event = here.memory(), here.stream(), here.stream(), here.event()
    here.prepare()
    here.begin(a)
    here.busy(a)
    here.set(pointer, 4, a)
    graph = here.end(a)
    here.do("cudaGraphLaunch", graph, a)
    here.do("cudaEventRecord", event, a)
    here.do("cudaGraphLaunch", graph, b)
    here.do("cudaStreamSynchronize", b)
    assert here.read(pointer, b) == 4
    assert here.ask("cudaEventQuery", event).name == "cudaSuccess"


@probe("runtime", MODES)
def the_legacy_stream_cannot_be_captured(here: Here) -> None:
    assert here.begin(0) == "cudaErrorStreamCaptureUnsupported"
    assert here.begin(1) == "cudaErrorStreamCaptureUnsupported"


@probe("runtime", CODES)
def a_capture_is_begun_once_and_ended_where_it_was_begun(here: Here) -> None:
    a, b = here.stream(), here.stream()
    here.begin(a)
    assert here.begin(a) == "cudaErrorIllegalState"
    assert here.ask("cudaStreamEndCapture", b).name == "cudaErrorIllegalState"
    here.ask("cudaStreamEndCapture", a)
    here.do("cudaStreamSynchronize", a)


@probe("runtime", FORBIDDEN)
def to_wait_for_a_stream_that_is_captured_ends_the_capture(here: Here) -> None:
    a = here.stream()
    here.begin(a)
    assert here.ask("cudaStreamSynchronize", a).name == "cudaErrorStreamCaptureUnsupported"
    _invalid(here, a)


@probe("runtime", FORBIDDEN)
def to_query_a_stream_that_is_captured_ends_the_capture(here: Here) -> None:
    a = here.stream()
    here.begin(a)
    assert here.ask("cudaStreamQuery", a).name == "cudaErrorStreamCaptureUnsupported"
    _invalid(here, a)


@probe("runtime", FORBIDDEN)
def to_wait_for_the_device_ends_every_capture_on_it(here: Here) -> None:
    a = here.stream()
    here.begin(a)
    assert here.ask("cudaDeviceSynchronize").name == "cudaErrorStreamCaptureUnsupported"
    _invalid(here, a)


@probe("runtime", FORBIDDEN)
def to_wait_for_the_device_in_another_thread_ends_a_thread_local_capture_too(here: Here) -> None:
    a = here.stream()
    here.begin(a)
    assert here.elsewhere(lambda: here.ask("cudaDeviceSynchronize").name) == "cudaErrorStreamCaptureUnsupported"
    _invalid(here, a)


def _calls_beside(here: Here, other: int, *, unsafe: bool) -> dict[str, Callable[[], Status]]:
    """Calls that have nothing to do with a stream that is captured: those that are unsafe meanwhile, or those that are not."""
    cudart, pointer = here.cudart, here.memory(nbytes=1 << 13)
    pool, event = here.do("cudaMemPoolCreate", _properties(cudart)), here.event()
    here.do("cudaEventRecord", event, other)
    pending = int(here.do("cudaMallocAsync", 64, other))
    here.do("cudaStreamSynchronize", other)
    graph = _graph(here)
    executable, spare = (here.do("cudaGraphInstantiate", graph, 0) for _ in range(2))
    host, freed = here.pinned(), here.memory()
    to_device, within = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    calls: dict[bool, dict[str, tuple[Any, ...]]] = {
        True: {
            "cudaStreamSynchronize": (other,),
            "cudaStreamQuery": (other,),
            "cudaEventQuery": (event,),
            "cudaEventSynchronize": (event,),
            "cudaMalloc": (64,),
            "cudaFree": (freed,),
            "cudaMallocAsync": (64, other),
            "cudaMallocFromPoolAsync": (64, pool, other),
            "cudaFreeAsync": (pending, other),
            "cudaMemPoolTrimTo": (pool, 0),
            "cudaMemPoolCreate": (_properties(cudart),),
            "cudaMemPoolDestroy": (pool,),
            "cudaHostAlloc": (64, cudart.cudaHostAllocDefault),
            "cudaFreeHost": (host.ctypes.data,),
            "cudaGraphInstantiate": (graph, 0),
            "cudaGraphExecDestroy": (spare,),
        },
        False: {
            "cudaEventRecord": (event, other),
            "cudaStreamWaitEvent": (other, event, 0),
            "cudaMemsetAsync": (pointer, 0, 64, other),
            "cudaMemcpyAsync": (pointer, host.ctypes.data, 64, to_device, other),
            "cudaMemcpy": (pointer + 2048, pointer + 4096, 64, within),
            "cudaGraphLaunch": (executable, other),
            "cudaGraphDestroy": (graph,),
            "cudaEventCreateWithFlags": (cudart.cudaEventDisableTiming,),
            "cudaEventDestroy": (event,),
            "cudaStreamCreateWithFlags": (cudart.cudaStreamNonBlocking,),
            "cudaStreamDestroy": (here.stream(),),
            "cudaPointerGetAttributes": (pointer,),
            "cudaMemGetInfo": (),
            "cudaGetDevice": (),
        },
    }
    return {name: partial(here.ask, name, *arguments) for name, arguments in calls[unsafe].items()}


def _properties(cudart: Any) -> Any:
    found, place = cudart.cudaMemPoolProps(), cudart.cudaMemLocation()
    found.allocType = cudart.cudaMemAllocationType.cudaMemAllocationTypePinned
    place.type, place.id = cudart.cudaMemLocationType.cudaMemLocationTypeDevice, 0
    found.location = place
    return found


def _graph(here: Here) -> Any:
    a, pointer = here.stream(), here.memory()
    here.begin(a)
    here.set(pointer, 1, a)
    return here.do("cudaStreamEndCapture", a)


@probe("runtime", SEEN)
def these_calls_of_the_same_thread_end_a_capture(here: Here) -> None:
    """Whatever they are about. A capture in the mode global or thread-local; the mode of a thread is global unless it says so."""
    a, b = here.stream(), here.stream()
    for name, call in _calls_beside(here, b, unsafe=True).items():
        here.begin(a)
        assert call().name == "cudaErrorStreamCaptureUnsupported", name
        _invalid(here, a)


@probe("runtime", SEEN)
def they_do_not_where_the_thread_is_relaxed_or_another(here: Here) -> None:
    pointer, a, b, modes = here.memory(), here.stream(), here.stream(), here.cudart.cudaStreamCaptureMode
    for elsewhere in (False, True):
        for name, call in _calls_beside(here, b, unsafe=True).items():
            here.begin(a)
            here.set(pointer, 1, a)
            if elsewhere:
                assert here.elsewhere(call).name == "cudaSuccess", name
            else:
                before = here.do("cudaThreadExchangeStreamCaptureMode", modes.cudaStreamCaptureModeRelaxed)
                assert call().name == "cudaSuccess", name
                here.do("cudaThreadExchangeStreamCaptureMode", before)
            here.end(a)


@probe("runtime", SEEN)
def these_calls_of_the_same_thread_leave_a_capture_alone(here: Here) -> None:
    pointer, a, b = here.memory(), here.stream(), here.stream()
    for name, call in _calls_beside(here, b, unsafe=False).items():
        here.begin(a)
        here.set(pointer, 1, a)
        assert call().name == "cudaSuccess", name
        here.end(a)


@probe("runtime", MODES)
def to_allocate_in_another_thread_ends_a_global_capture_alone(here: Here) -> None:
    a = here.stream()
    here.begin(a, "Global")
    assert here.elsewhere(lambda: here.ask("cudaMalloc", 64).name) == "cudaErrorStreamCaptureUnsupported"
    _invalid(here, a)
    here.begin(a, "ThreadLocal")
    assert here.elsewhere(lambda: here.ask("cudaMalloc", 64).name) == "cudaSuccess"
    here.end(a)


@probe("runtime", MODES)
def a_relaxed_capture_or_thread_may_allocate(here: Here) -> None:
    a, modes = here.stream(), here.cudart.cudaStreamCaptureMode
    here.begin(a, "Relaxed")
    here.do("cudaMalloc", 64)
    here.end(a)
    here.begin(a, "Global")
    before = here.do("cudaThreadExchangeStreamCaptureMode", modes.cudaStreamCaptureModeRelaxed)
    assert before == modes.cudaStreamCaptureModeGlobal
    here.do("cudaMalloc", 64)
    here.do("cudaThreadExchangeStreamCaptureMode", before)
    here.end(a)


@probe("runtime", SEEN)
def memory_that_a_graph_did_not_allocate_is_not_freed_in_it(here: Here) -> None:
    a = here.stream()
    first = int(here.do("cudaMallocAsync", 64, a))
    here.do("cudaStreamSynchronize", a)
    here.begin(a)
    assert here.ask("cudaFreeAsync", first, a).name == "cudaErrorInvalidValue"
    here.end(a)
    here.do("cudaFreeAsync", first, a)
    here.do("cudaStreamSynchronize", a)


@probe("runtime", CODES)
def the_legacy_stream_is_not_used_while_a_stream_that_waits_for_it_is_captured(here: Here) -> None:
    pointer, a = here.memory(), here.stream(blocking=True)
    here.begin(a)
    assert here.ask("cudaMemsetAsync", pointer, 1, 64, 0).name == "cudaErrorStreamCaptureImplicit"
    _invalid(here, a)


@probe("runtime", CODES)
def the_legacy_stream_can_be_used_while_a_stream_that_does_not_wait_for_it_is_captured(here: Here) -> None:
    pointer, other, a = here.memory(), here.memory(), here.stream()
    here.begin(a)
    here.set(other, 1, a)
    here.set(pointer, 3, 0)
    here.end(a)
    assert here.read(pointer, 0) == 3


@probe("runtime", EVENTS)
def a_capture_does_not_wait_for_events_outside(here: Here) -> None:
    a, b, event = here.stream(), here.stream(), here.event()
    here.do("cudaEventRecord", event, b)
    here.begin(a)
    assert here.ask("cudaStreamWaitEvent", a, event, 0).name == "cudaErrorStreamCaptureIsolation"
    _invalid(here, a)


@probe("runtime", EVENTS)
def a_stream_that_waits_for_an_event_of_a_capture_takes_part(here: Here) -> None:
    pointer, a, b, fork, back = here.memory(), here.stream(), here.stream(), here.event(), here.event()
    here.begin(a)
    here.do("cudaEventRecord", fork, a)
    here.do("cudaStreamWaitEvent", b, fork, 0)
    assert here.do("cudaStreamIsCapturing", b) == here.cudart.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive
    here.set(pointer, 6, b)
    here.do("cudaEventRecord", back, b)
    here.do("cudaStreamWaitEvent", a, back, 0)
    graph = here.end(a)
    assert here.read(pointer, b) == 0
    here.do("cudaGraphLaunch", graph, a)
    assert here.read(pointer, a) == 6


@probe("runtime", EVENTS)
def a_stream_that_took_part_must_be_waited_for(here: Here) -> None:
    pointer, a, b, fork = here.memory(), here.stream(), here.stream(), here.event()
    here.begin(a)
    here.do("cudaEventRecord", fork, a)
    here.do("cudaStreamWaitEvent", b, fork, 0)
    here.set(pointer, 6, b)
    assert here.ask("cudaStreamEndCapture", a).name == "cudaErrorStreamCaptureUnjoined"
    here.do("cudaStreamSynchronize", b)


@probe("runtime", FORBIDDEN)
def an_event_of_a_capture_is_neither_queried_nor_waited_for_by_the_host(here: Here) -> None:
    for call in ("cudaEventQuery", "cudaEventSynchronize"):
        a, event = here.stream(), here.event()
        here.begin(a)
        here.do("cudaEventRecord", event, a)
        assert here.ask(call, event).name == "cudaErrorCapturedEvent", call
        _invalid(here, a)


@probe("runtime", EVENTS)
def captures_are_not_merged(here: Here) -> None:
    a, b, event = here.stream(), here.stream(), here.event()
    here.begin(a)
    here.begin(b)
    here.do("cudaEventRecord", event, a)
    assert here.ask("cudaStreamWaitEvent", b, event, 0).name == "cudaErrorStreamCaptureMerge"
    here.ask("cudaStreamEndCapture", a)
    here.ask("cudaStreamEndCapture", b)


@probe("runtime", EVENTS)
def the_legacy_stream_takes_no_part_in_a_capture(here: Here) -> None:
    a, event = here.stream(), here.event()
    here.begin(a)
    here.do("cudaEventRecord", event, a)
    assert here.ask("cudaStreamWaitEvent", 0, event, 0).name != "cudaSuccess"  # no document names the error
    here.ask("cudaStreamEndCapture", a)


@probe("runtime", EVENTS)
def an_event_of_a_capture_that_has_ended_is_not_waited_for(here: Here) -> None:
    a, b, event = here.stream(), here.stream(), here.event()
    here.begin(a)
    here.do("cudaEventRecord", event, a)
    here.end(a)
    assert here.ask("cudaStreamWaitEvent", b, event, 0).name != "cudaSuccess"


@probe("runtime", GRAPHS)
def two_captures_of_two_streams_do_not_disturb_one_another(here: Here) -> None:
    first, second, a, b = here.memory(), here.memory(), here.stream(), here.stream()
    here.begin(a)
    here.begin(b)
    here.set(first, 1, a)
    here.set(second, 2, b)
    captured = [here.do("cudaStreamEndCapture", stream) for stream in (a, b)]
    for graph in captured:
        here.do("cudaGraphLaunch", here.do("cudaGraphInstantiate", graph, 0), a)
    assert (here.read(first, a), here.read(second, a)) == (1, 2)


@probe("runtime", MODES)
def a_capture_is_ended_in_the_thread_that_began_it(here: Here) -> None:
    a = here.stream()
    here.begin(a)
    assert here.elsewhere(lambda: here.ask("cudaStreamEndCapture", a).name) == "cudaErrorStreamCaptureWrongThread"
    here.ask("cudaStreamEndCapture", a)
    here.do("cudaStreamSynchronize", a)
