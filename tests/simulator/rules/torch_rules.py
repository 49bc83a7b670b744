"""Rules of torch.cuda: streams, the caching allocator, graphs and errors."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tests.simulator.rules.probe import Here, probe

SEMANTICS = "PyTorch documentation, CUDA semantics"
SLEEP = 200_000_000
"""Cycles: a tenth of a second."""


@probe("torch", "c10/cuda/CUDAStream.h: StreamId; seen with torch 2.11")
def handle_1_is_no_stream_to_torch(here: Here) -> None:
    for handle in (0, 2):
        assert here.torch.cuda.ExternalStream(handle).cuda_stream >= 0
    found = here.torch.cuda.ExternalStream(1)  # which torch makes, and does not know
    assert "StreamId" in here.refused(lambda: found.cuda_stream)


@probe("torch", "c10/cuda/CUDAStream.h")
def there_are_32_streams_which_are_handed_out_in_turn(here: Here) -> None:
    handles = [here.torch.cuda.Stream().cuda_stream for _ in range(64)]
    assert len(set(handles)) == 32
    assert handles[:32] == handles[32:]


@probe("torch", SEMANTICS + ": CUDA streams")
def torchs_streams_do_not_wait_for_the_default_stream(here: Here) -> None:
    torch = here.torch
    x = torch.zeros(64, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x.fill_(0).cpu()  # what is used for the first time is loaded, which may wait for the device
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    x.fill_(1)
    with torch.cuda.stream(stream):
        assert here.stale(lambda: int(x.cpu()[0]), old=0)


@probe("torch", SEMANTICS + ": CUDA streams")
def wait_stream_orders(here: Here) -> None:
    torch = here.torch
    x, stream = torch.zeros(64, dtype=torch.uint8, device="cuda"), torch.cuda.Stream()
    torch.cuda._sleep(SLEEP)
    x.fill_(1)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert int(x.cpu()[0]) == 1


@probe("torch", SEMANTICS + ": Memory management")
def the_memory_of_a_tensor_is_handed_on_at_once_on_its_stream(here: Here) -> None:
    torch = here.torch
    x = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    address = x.data_ptr()
    torch.cuda._sleep(SLEEP)
    x.fill_(1)
    del x
    assert torch.empty(1 << 16, dtype=torch.uint8, device="cuda").data_ptr() == address


@probe("torch", "torch.Tensor.record_stream")
def record_stream_keeps_memory_until_the_other_stream_is_done(here: Here) -> None:
    torch = here.torch
    stream = torch.cuda.Stream()
    x = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    address = x.data_ptr()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        x.fill_(1)
    x.record_stream(stream)
    del x
    other = torch.empty(1 << 16, dtype=torch.uint8, device="cuda")
    assert other.data_ptr() != address
    stream.synchronize()
    found = [torch.empty(1 << 16, dtype=torch.uint8, device="cuda") for _ in range(2)]
    assert address in [y.data_ptr() for y in found]


@probe("torch", SEMANTICS + ": Memory management")
def memory_belongs_to_the_stream_that_was_current(here: Here) -> None:
    torch = here.torch
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    address = x.data_ptr()
    torch.cuda.synchronize()
    del x
    assert torch.empty(1 << 16, dtype=torch.uint8, device="cuda").data_ptr() != address


@probe("torch", SEMANTICS + ": Use pinned memory buffers")
def a_copy_to_pinned_memory_that_does_not_block_returns_before_it_is_done(here: Here) -> None:
    torch = here.torch
    x = torch.full((64,), 7, dtype=torch.uint8, device="cuda")
    host = torch.empty(64, dtype=torch.uint8, pin_memory=True)
    host.fill_(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    host.copy_(x, non_blocking=True)
    assert int(host[0]) != 7
    torch.cuda.synchronize()
    assert int(host[0]) == 7


@probe("torch", "torch.cuda.CUDAGraph")
def the_default_stream_is_not_captured(here: Here) -> None:
    assert "non-default stream" in here.refused(here.torch.cuda.CUDAGraph().capture_begin)


@probe("torch", "torch.cuda.graph: static inputs and outputs")
def a_graph_replays_the_addresses_that_it_saw(here: Here) -> None:
    torch = here.torch
    x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = x * 2
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [10.0] * 4


@probe("torch", "torch.cuda.graphs.graph.__exit__; seen with torch 2.11")
def a_capture_that_fails_leaves_another_stream_current(here: Here) -> None:
    torch = here.torch
    x, graph, before = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    torch.cuda.synchronize()

    def capture() -> None:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            (x * 2).sum().item()

    here.refused(capture)
    assert torch.cuda.current_stream() != before
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.set_stream(before)
    assert (x * 2).tolist() == [2.0] * 4


@probe("torch", "torch.cuda.graphs.graph.__enter__ waits for the device; seen with torch 2.11")
def two_captures_by_torch_at_once_end_in_an_error_in_one(here: Here) -> None:
    torch = here.torch
    begun, tried = threading.Event(), threading.Event()
    failed: list[str] = []

    def capture(work: Callable[[], object]) -> None:
        x = torch.ones(4, device="cuda")
        torch.cuda.current_stream().synchronize()
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                x * 2
                work()
        except RuntimeError as error:
            failed.append(str(error))

    def wait() -> None:
        begun.set()
        tried.wait(30)

    def first() -> None:
        capture(wait)

    def second() -> None:
        begun.wait(30)
        capture(lambda: None)
        tried.set()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed
    assert torch.ones(2, device="cuda").tolist() == [1.0, 1.0]


@probe("torch", "torch.OutOfMemoryError")
def to_run_out_of_memory_is_an_error_of_its_own_and_harms_nothing_else(here: Here) -> None:
    torch = here.torch
    _, total = torch.cuda.mem_get_info()
    assert "out of memory" in here.refused(lambda: torch.empty(2 * total, dtype=torch.uint8, device="cuda"))
    assert torch.ones(2, device="cuda").tolist() == [1.0, 1.0]


@probe("torch", "torch.Tensor.data_ptr")
def an_empty_tensor_has_no_address(here: Here) -> None:
    assert here.torch.empty(0, 4, device="cuda").data_ptr() == 0


@probe("torch", "torch.Tensor.__cuda_array_interface__")
def torch_tells_no_stream_with_its_arrays(here: Here) -> None:
    x = here.torch.ones(4, device="cuda")
    assert x.__cuda_array_interface__.get("stream") is None
    assert x.__cuda_array_interface__["data"] == (x.data_ptr(), False)


@probe("torch", "cuda_runtime_api.h: errors of the device are returned by every later call")
def an_error_on_the_device_is_returned_by_every_later_call(here: Here) -> None:
    torch = here.torch
    x = torch.ones(3, device="cuda")
    index = torch.tensor([7], device="cuda")
    torch.cuda.synchronize()
    for call in (lambda: x[index].sum().item(), torch.cuda.synchronize, lambda: torch.ones(2, device="cuda").sum().item()):
        here.refused(call)
    pointer = here.ask("cudaMalloc", 64).name
    assert pointer == "cudaErrorAssert", pointer
