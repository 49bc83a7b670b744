"""Programs that break one rule each, and what the simulator says of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.simulator.artifacts import model
from tests.simulator.plans import make_plan
from tests.simulator.rules.probe import Here
from tests.simulator.simulated import Simulated


class Fault(NamedTuple):
    """says: a part of the error."""

    says: str
    run: Callable[[Fixture], None]


FAULTS: dict[str, Fault] = {}


def fault(says: str) -> Callable[[Callable[[Fixture], None]], Callable[[Fixture], None]]:
    def add(function: Callable[[Fixture], None]) -> Callable[[Fixture], None]:
        FAULTS[function.__name__] = Fault(says, function)
        return function

    return add


class Fixture(Here):
    """`Here` on the simulator, with an engine `y = 2 x` whose buffers are for 8 rows."""

    def __init__(self, simulated: Simulated) -> None:
        super().__init__(simulated.runtime, torch, simulated.trt, make_plan)
        self.simulated = simulated
        self.x, self.y = self.memory(0, 512), self.memory(0, 512)

    def engine(self, outputs: tuple[str, ...] = ("y",), flavour: str = "tensorrt") -> Any:
        front = self.simulated.trt if flavour == "tensorrt" else self.simulated.rtx
        ranges = [{"x": ((1, 4), (2, 4), (high, 4))} for high in (4, 8)]
        return front.Runtime(front.Logger()).deserialize_cuda_engine(make_plan(model(outputs), ranges, flavour=flavour))

    def context(self, rows: int = 2, engine: Any = None) -> Any:
        context = (engine or self.engine()).create_execution_context()
        context.set_input_shape("x", (rows, 4))
        context.set_tensor_address("x", self.x)
        context.set_tensor_address("y", self.y)
        return context

    def graph(self, context: Any, stream: int) -> Any:
        """A captured run, after a plain one."""
        assert context.execute_async_v3(stream)
        self.begin(stream)
        assert context.execute_async_v3(stream)
        return self.end(stream)


# Streams and events.


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


# Memory.


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


# Graphs.


@fault("use after free")
def to_launch_a_graph_whose_memory_was_freed(f: Fixture) -> None:
    a = f.stream()
    f.begin(a)
    f.set(f.x, 1, a)
    graph = f.end(a)
    f.do("cudaFree", f.x)
    f.do("cudaGraphLaunch", graph, a)


@fault("replays")
def to_launch_a_graph_whose_memory_has_another_owner(f: Fixture) -> None:
    a = f.stream()
    pointer = f.do("cudaMallocAsync", 64, a)
    f.begin(a)
    f.set(pointer, 1, a)
    graph = f.end(a)
    f.do("cudaFreeAsync", pointer, a)
    assert f.do("cudaMallocAsync", 64, a) == pointer
    f.do("cudaGraphLaunch", graph, a)


@fault("a graph that was destroyed")
def to_launch_a_graph_that_was_destroyed(f: Fixture) -> None:
    a = f.stream()
    f.begin(a)
    graph = f.end(a)
    f.do("cudaGraphExecDestroy", graph)
    f.do("cudaGraphLaunch", graph, a)


@fault("no ordering in the graph")
def to_capture_two_branches_that_use_the_same_memory(f: Fixture) -> None:
    a, b, event = f.stream(), f.stream(), f.event()
    f.begin(a)
    f.do("cudaEventRecord", event, a)
    f.do("cudaStreamWaitEvent", b, event, 0)
    try:
        f.set(f.x, 1, a)
        f.set(f.x, 2, b)
    finally:
        f.ask("cudaStreamEndCapture", a)


@fault("no ordering: enqueueV3")
def to_launch_a_graph_without_waiting_for_its_input(f: Fixture) -> None:
    a, b = f.stream(), f.stream()
    context = f.context()
    graph = f.graph(context, a)
    f.do("cudaStreamSynchronize", a)
    f.set(f.x, 1, b)
    f.do("cudaGraphLaunch", graph, a)


# Execution contexts.


@fault("the workspace of a context")
def to_run_one_context_on_two_streams(f: Fixture) -> None:
    context = f.context()
    context.execute_async_v3(f.stream())
    context.set_tensor_address("y", f.memory(0, 512))
    context.execute_async_v3(f.stream())


@fault("has not run plainly since")
def to_capture_the_first_run_of_a_shape(f: Fixture) -> None:
    a, context = f.stream(), f.context()
    f.begin(a)
    try:
        context.execute_async_v3(a)
    finally:
        f.ask("cudaStreamEndCapture", a)


@fault("has run with")
def to_launch_a_graph_whose_context_ran_with_another_shape(f: Fixture) -> None:
    a, context = f.stream(), f.context(2)
    graph = f.graph(context, a)
    context.set_input_shape("x", (3, 4))
    context.execute_async_v3(a)
    f.do("cudaGraphLaunch", graph, a)


@fault("has run with")
def to_launch_a_graph_whose_context_ran_with_another_profile(f: Fixture) -> None:
    a, context = f.stream(), f.context(2)
    graph = f.graph(context, a)
    context.set_optimization_profile_async(1, a)
    context.set_input_shape("x", (2, 4))
    context.execute_async_v3(a)
    f.do("cudaGraphLaunch", graph, a)


@fault("whose execution context was destroyed")
def to_launch_a_graph_whose_context_is_gone(f: Fixture) -> None:
    a, context = f.stream(), f.context()
    graph = f.graph(context, a)
    f.do("cudaStreamSynchronize", a)
    del context
    f.do("cudaGraphLaunch", graph, a)


@fault("the destruction of the workspace of a context")
def to_destroy_a_context_that_is_at_work(f: Fixture) -> None:
    a, context = f.stream(), f.context()
    context.execute_async_v3(a)
    del context
    gc.collect()


@fault("on stream")
def to_change_the_profile_on_another_stream(f: Fixture) -> None:
    context = f.context()
    context.set_optimization_profile_async(1, f.stream())
    context.set_input_shape("x", (2, 4))
    context.execute_async_v3(f.stream())


@fault("no ordering: cudaMemsetAsync")
def to_overwrite_an_input_while_the_engine_reads_it(f: Fixture) -> None:
    context = f.context()
    context.execute_async_v3(f.stream())
    f.set(f.x, 1, f.stream())


@fault("which is written by enqueueV3")
def to_read_an_output_without_waiting(f: Fixture) -> None:
    context = f.context()
    context.execute_async_v3(f.stream())
    f.read(f.y, f.stream())


@fault("while the thread is on cuda:1")
def to_run_an_engine_while_another_gpu_is_current(f: Fixture) -> None:
    context, a = f.context(), f.stream()
    f.do("cudaSetDevice", 1)
    try:
        context.execute_async_v3(a)
    finally:
        f.do("cudaSetDevice", 0)


@fault("the output allocator of positive was dropped")
def to_drop_an_output_allocator(f: Fixture) -> None:
    context = f.context(engine=f.engine(("y", "positive")))

    class Allocator(f.trt.IOutputAllocator):  # type: ignore[misc,name-defined]
        pass

    context.set_output_allocator("positive", Allocator())
    context.execute_async_v3(f.stream())


@fault("has an address and no allocator")
def to_give_an_address_for_a_shape_that_depends_on_data(f: Fixture) -> None:
    context = f.context(engine=f.engine(("y", "positive")))
    context.set_tensor_address("positive", f.memory(0, 512))
    context.execute_async_v3(f.stream())


@fault("the runtime cache was dropped")
def to_drop_the_runtime_cache_of_rtx(f: Fixture) -> None:
    engine = f.engine(flavour="tensorrt-rtx")
    config = engine.create_runtime_config()
    config.set_runtime_cache(config.create_runtime_cache())
    context = engine.create_execution_context(config)
    context.set_input_shape("x", (2, 4))
    context.set_tensor_address("x", f.x)
    context.set_tensor_address("y", f.y)
    context.execute_async_v3(f.stream())


# torch.


@fault("neither record_stream nor a wait")
def to_drop_a_tensor_that_another_stream_uses(f: Fixture) -> None:
    x, stream = torch.ones(4, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.mul_(2)
    del x


@fault("which is written by the allocation of a torch tensor")
def to_use_a_tensor_on_a_stream_it_was_not_allocated_for(f: Fixture) -> None:
    torch.ones(4, device="cuda").add_(1)  # the default stream has work to do
    x = torch.empty(4, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        x.fill_(1)


@fault("which is written by aten.fill_")
def to_give_the_engine_a_tensor_that_is_not_ready(f: Fixture) -> None:
    x = torch.empty(8, 4, device="cuda").fill_(1)
    context = f.context()
    context.set_tensor_address("x", x.data_ptr())
    context.execute_async_v3(f.stream())
    f.do("cudaDeviceSynchronize")


@fault("no ordering: aten.mul")
def to_take_a_result_of_the_engine_without_waiting(f: Fixture) -> None:
    y, stream = torch.zeros(2, 4, device="cuda"), f.stream()
    torch.cuda.synchronize()
    context = f.context()
    context.set_tensor_address("y", y.data_ptr())
    context.execute_async_v3(stream)
    try:
        y * 2
    finally:
        torch.cuda.synchronize()


@fault("the host changed pinned memory")
def to_change_pinned_memory_that_torch_copies(f: Fixture) -> None:
    host = torch.ones(4, pin_memory=True)
    host.cuda(non_blocking=True)
    host.fill_(2)
    torch.cuda.synchronize()
