"""CUDA graphs of functions on torch tensors."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deploy.engine.cuda.capturing import capturing
from deploy.errors import BackendError
from deploy.runtime.session import first_line

GRAPHS = 8
"""The largest number of CUDA graphs that are kept, one for each shape of the inputs: those used last."""

_WARMUPS = 3

_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. torch's host allocator may still ask them, for as long as the process lives."""


class _Captured:
    """One CUDA graph, and the tensors that it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        self.graph = graph
        self.inputs = inputs
        self.outputs = outputs


class CudaGraphs:
    """A function on lists of CUDA tensors, captured in one CUDA graph for each shape of the inputs.

    Calls may come from many threads and streams; the runs on the GPU follow one another, because they share the graph's
    tensors. Warm-up and capture as in "CUDA Graphs" of torch's notes on CUDA semantics.
    """

    def __init__(self, function: Callable[[list[torch.Tensor]], list[torch.Tensor]], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._captured: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None  # the end of the last run

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The results, in new tensors. Raises BackendError if the function cannot be captured."""
        key = tuple((x.shape, x.stride()) for x in inputs)
        with self._lock, torch.cuda.device(self._device):
            if key not in self._captured:
                self._captured[key] = self._capture(inputs)
            self._captured.move_to_end(key)
            captured = self._captured[key]
            stream = torch.cuda.current_stream(self._device)
            if self._done is not None:
                stream.wait_event(self._done)
            for own, x in zip(captured.inputs, inputs, strict=True):
                own.copy_(x)
                own.record_stream(stream)  # so that it is not reused before this run ends if the session is closed meanwhile
            captured.graph.replay()
            results = [x.clone() for x in captured.outputs]
            self._done = stream.record_event()
            return results

    def _capture(self, inputs: Sequence[torch.Tensor]) -> _Captured:
        if self._done is not None:
            self._done.synchronize()  # a graph may be dropped only after it has run
        while len(self._captured) >= GRAPHS:
            self._captured.popitem(last=False)
        with capturing:
            own = [x.clone() for x in inputs]
            side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                for _ in range(_WARMUPS):
                    self._function(own)
            torch.cuda.current_stream(self._device).wait_stream(side)
            graph, outputs = capture(lambda: self._function(own), side)
        return _Captured(graph, own, outputs)


def capture(
    function: Callable[[], list[torch.Tensor]], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """What `function` queues on `stream`, as a CUDA graph, and its results in the memory of the graph.

    The caller holds `capturing`. Raises BackendError if it cannot be captured; the current stream, torch's allocator and its random
    generators are then as before.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle()
    try:
        # The outer context puts the caller's stream back where torch.cuda.graph, after a failure, does not.
        # thread_local: other threads may allocate memory meanwhile.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            outputs = function()
    except BaseException as error:  # the module may do anything that a graph cannot hold, and Ctrl-C may come
        _end(graph, stream, pool)
        if not isinstance(error, Exception):
            raise
        raise BackendError(
            f"the module cannot be captured in a CUDA graph: {type(error).__name__}: {first_line(error)}; leave out cuda_graph"
        ) from error
    return graph, outputs


def _end(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> None:
    """End what a failed capture leaves open in torch.

    Its allocator would keep every block that other streams have used. Its random generators would fail at every later use ("Offset
    increment outside graph capture"); a capture that succeeds ends that.
    """
    _failed.append(graph)
    device = torch.device(stream.device).index
    with contextlib.suppress(RuntimeError):  # the capture failed before it allocated, or after it had ended
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    with contextlib.suppress(RuntimeError):  # the GPU is dead, which the reason of the failure says
        x = torch.zeros(1, device=stream.device)
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"),
        ):
            x.zero_()
