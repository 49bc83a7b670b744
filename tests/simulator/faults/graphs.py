"""Mistakes with captures and graphs."""

from __future__ import annotations

from tests.simulator.faults.fault import Fixture, fault


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


@fault("a graph is launched on")
def to_launch_a_graph_while_another_gpu_is_current(f: Fixture) -> None:
    a = f.stream()
    f.begin(a)
    graph = f.end(a)
    f.do("cudaSetDevice", 1)
    try:
        f.do("cudaGraphLaunch", graph, a)
    finally:
        f.do("cudaSetDevice", 0)
