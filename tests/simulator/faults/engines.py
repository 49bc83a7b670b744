"""Mistakes with engines and their contexts."""

from __future__ import annotations

import gc

from tests.simulator.faults.fault import Fixture, fault


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


@fault("a context for cuda:0 is made while")
def to_make_a_context_while_another_gpu_is_current(f: Fixture) -> None:
    engine = f.engine()
    f.do("cudaSetDevice", 1)
    try:
        engine.create_execution_context()
    finally:
        f.do("cudaSetDevice", 0)


@fault("set_optimization_profile_async on stream")
def to_change_the_profile_while_another_gpu_is_current(f: Fixture) -> None:
    context, a = f.context(), f.stream()
    f.do("cudaSetDevice", 1)
    try:
        context.set_optimization_profile_async(1, a)
    finally:
        f.do("cudaSetDevice", 0)


@fault("an engine without weights runs")
def to_run_an_engine_that_was_not_refitted(f: Fixture) -> None:
    context = f.context(engine=f.engine(stripped=True))
    context.execute_async_v3(f.stream())


@fault("an engine is refitted that has contexts")
def to_refit_an_engine_that_has_contexts(f: Fixture) -> None:
    engine = f.engine(stripped=True)
    context = f.context(engine=engine)
    f.trt.Refitter(engine, f.trt.Logger()).refit_cuda_engine()
    del context


@fault("is refitted while another GPU is current")
def to_refit_an_engine_while_another_gpu_is_current(f: Fixture) -> None:
    engine = f.engine(stripped=True)
    f.do("cudaSetDevice", 1)
    try:
        f.trt.Refitter(engine, f.trt.Logger()).refit_cuda_engine()
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
