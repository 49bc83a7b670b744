"""An execution context of an engine, with its stream, buffers and CUDA graphs: everything that one run needs for itself."""

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from deploy.artifact.tensors import TensorSpec, format_shape
from deploy.engine.cuda import Device, Event, Graph, Memory, Stream
from deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger("deploy.runtime")

GRAPHS = 8
"""The number of CUDA graphs that a context keeps, one for each set of input shapes; the least recently used goes first."""

ALIGNMENT = 256
"""The address of a tensor must be a multiple of this many bytes (IExecutionContext::setTensorAddress)."""

PIECE = 1 << 20
"""The bytes that are staged before their copy begins: the copy of one piece overlaps the staging of the next."""

Shape = tuple[int, ...]


class Tensor(NamedTuple):
    """An input in device memory: its address and its shape."""

    pointer: int
    shape: Shape


class _Buffer:
    """The device memory and the pinned memory of one tensor, which grow to the largest size that was requested."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: Memory | None = None
        self._host: np.ndarray | None = None

    def memory(self, nbytes: int) -> Memory:
        if self._memory is None or not self.fits(nbytes):
            self._memory = None  # freed first: there may be no room for both
            self._memory = self._device.allocate(nbytes)
        return self._memory

    def fits(self, nbytes: int) -> bool:
        return self._memory is not None and self._memory.nbytes >= nbytes

    def host(self, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8, pinned."""
        if self._host is None or self._host.size < nbytes:
            self._host = None
            self._host = self._device.pinned(nbytes)
        return self._host[:nbytes]


class EngineContext:
    """An execution context, for one run at a time. Raises BackendError if CUDA or the engine fails; it stays usable.

    context: an IExecutionContext of either flavour. graphs: replay a CUDA graph from the second run of a shape on.
    allocator: makes an IOutputAllocator for an output whose shape depends on data; see `make_allocator`.
    """

    def __init__(
        self,
        context: "tensorrt.IExecutionContext",
        device: Device,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        graphs: bool,
        allocator: Callable[[Device], Any],
    ) -> None:
        self._context = context
        self._device = device
        self._inputs = [(spec.name, np.dtype(spec.dtype)) for spec in inputs]
        self._outputs = [(spec.name, np.dtype(spec.dtype)) for spec in outputs]
        self._graphs_wanted = self._graphs_usual = graphs
        self._make_allocator = allocator
        self.stream: Stream = device.stream()
        self._event: Event = device.event()
        self._busy_on: int | None = None  # handle of the stream on which the last run may still be under way
        self._buffers: dict[str, _Buffer] = {}
        self._addresses: dict[str, int] = {}
        self._bound: tuple[int, tuple[Shape, ...]] | None = None
        self._shapes: list[Shape | None] = []
        self._allocators: dict[str, Any] = {}
        self._graphs: OrderedDict[tuple[Shape, ...], Graph | None] = OrderedDict()  # None: seen once, or refused
        self._refused: set[tuple[Shape, ...]] = set()
        self._pending: list[tuple[np.ndarray, Shape, np.dtype[Any], Memory]] = []

    # Arrays in host memory: begin, finish.

    def begin(self, feed: Mapping[str, np.ndarray], profile: int) -> None:
        """Stage the inputs, and queue all work, including the copies of the outputs, on the context's own stream."""
        with self._device.active():
            self._begin(feed, profile)

    def _begin(self, feed: Mapping[str, np.ndarray], profile: int) -> None:
        self._take(self.stream)
        try:
            self._bind(profile, tuple(feed[name].shape for name, _ in self._inputs), self.stream)
            for name, _ in self._inputs:
                self._set_address(name, self._stage(name, feed[name]))
            memories = self._set_outputs(self.stream)
            self._execute(self.stream)
            self._pending = []
            for name, dtype, memory, shape in self._results(memories, self.stream):
                nbytes = _nbytes(shape, dtype)
                host = self._buffer(name).host(nbytes)
                if nbytes:
                    memory.read(host, self.stream)
                self._pending.append((host, shape, dtype, memory))  # the stream reads the memory later
        except BaseException:
            self.settle()
            raise

    def finish(self) -> list[np.ndarray]:
        """Wait for the run that was begun; the outputs, in new arrays."""
        self.stream.synchronize()
        self._busy_on = None
        pending, self._pending = self._pending, []
        return [host.view(dtype).reshape(shape).copy() for host, shape, dtype, _ in pending]

    def times(self, feed: Mapping[str, np.ndarray], profile: int) -> tuple[float, float, float] | None:
        """The milliseconds of the copies in, the run and the copies out, one after the other, by events on the GPU.

        None if the shape of an output depends on data: its copy cannot be queued in advance.
        """
        self.begin(feed, profile)
        self.finish()  # the inputs are staged now, so that only the copies are timed
        if None in self._shapes:
            return None
        with self._device.active():
            marks = [self._device.event(timed=True) for _ in range(4)]
            self._take(self.stream)
            marks[0].record(self.stream)
            for name, array in feed.items():
                self._buffer(name).memory(array.nbytes).write(self._buffer(name).host(array.nbytes), self.stream)
            marks[1].record(self.stream)
            self._execute(self.stream)
            marks[2].record(self.stream)
            for (name, dtype), shape in zip(self._outputs, self._shapes, strict=True):
                if shape is not None and (nbytes := _nbytes(shape, dtype)):
                    self._buffer(name).memory(nbytes).read(self._buffer(name).host(nbytes), self.stream)
            marks[3].record(self.stream)
            self.stream.synchronize()
            self._busy_on = None
            first, second, third = (after.since(before) for before, after in itertools.pairwise(marks))
        return first, second, third

    def _stage(self, name: str, array: np.ndarray) -> int:
        memory = self._fit(name, array.nbytes, self.stream)
        host = self._buffer(name).host(array.nbytes)
        source = array.reshape(-1).view(np.uint8)
        for start in range(0, source.size, PIECE):
            piece = host[start : start + PIECE]
            piece[:] = source[start : start + PIECE]
            memory.write(piece, self.stream, start)
        return memory.pointer

    # Arrays in device memory.

    def run(
        self, inputs: Sequence[Tensor], shapes: tuple[Shape, ...], profile: int, stream: Stream
    ) -> list[tuple[Memory, Shape]]:
        """Give the work to `stream`, which the inputs are made on, in their order: memory of each output, and its shape.

        It returns before the work is done, but for outputs whose shape depends on data.
        """
        with self._device.active():
            return self._run(inputs, shapes, profile, stream)

    def _run(
        self, inputs: Sequence[Tensor], shapes: tuple[Shape, ...], profile: int, stream: Stream
    ) -> list[tuple[Memory, Shape]]:
        self._take(stream)
        try:
            self._bind(profile, shapes, stream)
            if self._graphs_wanted:
                return self._run_graph(inputs, stream)
            for (name, dtype), tensor in zip(self._inputs, inputs, strict=True):
                pointer = tensor.pointer
                if pointer % ALIGNMENT:
                    pointer = self._copy_in(name, tensor, dtype, stream)
                self._set_address(name, pointer)
            memories: dict[str, Memory] = {}
            for (name, dtype), shape in zip(self._outputs, self._shapes, strict=True):
                if shape is not None:
                    memories[name] = self._device.output(shape, dtype)
                    self._set_address(name, memories[name].pointer)
            self._set_allocators()
            self._launch(stream)
            return [(memory, shape) for _, _, memory, shape in self._results(memories, stream)]
        except BaseException:
            stream.synchronize()
            raise
        finally:
            self._event.record(stream)

    def _run_graph(self, inputs: Sequence[Tensor], stream: Stream) -> list[tuple[Memory, Shape]]:
        for (name, dtype), tensor in zip(
            self._inputs, inputs, strict=True
        ):  # a graph uses the addresses that it was captured with
            self._set_address(name, self._copy_in(name, tensor, dtype, stream))
        memories = self._set_outputs(stream)
        self._execute(stream)
        results = []
        for name, dtype, memory, shape in self._results(memories, stream):
            if name not in memories:
                results.append((memory, shape))  # made for this run
                continue
            nbytes = _nbytes(shape, dtype)
            result = self._device.output(shape, dtype)
            result.copy(memory.pointer, nbytes, stream)
            results.append((result, shape))
        return results

    def _copy_in(self, name: str, tensor: Tensor, dtype: np.dtype[Any], stream: Stream) -> int:
        nbytes = _nbytes(tensor.shape, dtype)
        memory = self._fit(name, nbytes, stream)
        memory.copy(tensor.pointer, nbytes, stream)
        return memory.pointer

    # Both.

    def _take(self, stream: Stream) -> None:
        """Let `stream` wait for the last run, because all runs of a context use the same memory."""
        if self._busy_on is not None and self._busy_on != stream.handle:
            self._event.hold(stream)
        self._busy_on = stream.handle

    def settle(self) -> None:
        """Wait until nothing is under way on the context's own stream, and drop the outputs of a run that was begun."""
        self.stream.synchronize()
        self._pending = []

    def _buffer(self, name: str) -> _Buffer:
        if name not in self._buffers:
            self._buffers[name] = _Buffer(self._device)
        return self._buffers[name]

    def _fit(self, name: str, nbytes: int, stream: Stream) -> Memory:
        """The buffer's memory. Before it grows, the stream must be done with it, and graphs that use it are dropped."""
        buffer = self._buffer(name)
        if not buffer.fits(nbytes):
            stream.synchronize()
            self._graphs.clear()
        return buffer.memory(nbytes)

    def _bind(self, profile: int, shapes: tuple[Shape, ...], stream: Stream) -> None:
        if self._bound == (profile, shapes):
            return
        changed = self._bound is None or self._bound[0] != profile
        self._bound = None
        if changed and not self._context.set_optimization_profile_async(profile, stream.handle):
            raise BackendError(f"the engine refused its profile {profile}")
        for (name, _), shape in zip(self._inputs, shapes, strict=True):
            if not self._context.set_input_shape(name, shape):
                raise InputError(f"the engine refused shape {format_shape(shape)} for {name!r}")
        known = [tuple(cast(Sequence[int], self._context.get_tensor_shape(name))) for name, _ in self._outputs]
        self._shapes = [None if any(size < 0 for size in shape) else shape for shape in known]
        self._bound = (profile, shapes)

    def _set_address(self, name: str, pointer: int) -> None:
        if self._addresses.get(name) == pointer:
            return
        if not self._context.set_tensor_address(name, pointer):
            raise BackendError(f"the engine refused the address of {name!r}")
        self._addresses[name] = pointer

    def _set_outputs(self, stream: Stream) -> dict[str, Memory]:
        """Direct outputs of known shape to the buffers, and the others to the memory of their allocators."""
        memories = {}
        for (name, dtype), shape in zip(self._outputs, self._shapes, strict=True):
            if shape is not None:
                memories[name] = self._fit(name, _nbytes(shape, dtype), stream)
                self._set_address(name, memories[name].pointer)
        self._set_allocators()
        return memories

    def _set_allocators(self) -> None:
        for (name, _), shape in zip(self._outputs, self._shapes, strict=True):
            if shape is None and name not in self._allocators:
                allocator = self._make_allocator(self._device)
                if not self._context.set_output_allocator(name, allocator):
                    raise BackendError(f"the engine refused an allocator for {name!r}, whose shape depends on data")
                self._allocators[name] = allocator

    def _results(self, memories: Mapping[str, Memory], stream: Stream) -> list[tuple[str, np.dtype[Any], Memory, Shape]]:
        """The outputs with their memory. Waits for the run if a shape is known only afterwards."""
        if len(memories) < len(self._outputs):
            stream.synchronize()
        results = []
        for (name, dtype), shape in zip(self._outputs, self._shapes, strict=True):
            if shape is not None:
                results.append((name, dtype, memories[name], shape))
            else:
                memory, actual = self._allocators[name].take()
                results.append((name, dtype, memory, actual))
        return results

    def _execute(self, stream: Stream) -> None:
        """Run by graph if that is wanted and possible. The first run of a shape is a plain one, as TensorRT requires."""
        assert self._bound is not None
        shapes = self._bound[1]
        if not self._graphs_wanted or shapes in self._refused:
            self._launch(stream)
            return
        graph = self._graphs.get(shapes)
        if graph is None:
            if shapes not in self._graphs:
                self._launch(stream)
                self._remember(shapes, None)
                return
            try:
                graph = self._capture(stream)
            except BackendError as error:
                logger.warning("no CUDA graph for %s: %s; it runs without", "; ".join(map(format_shape, shapes)), error)
                self._refused.add(shapes)
                self._launch(stream)
                return
        self._remember(shapes, graph)
        graph.launch(stream)

    def _capture(self, stream: Stream) -> Graph:
        if None in self._shapes:
            raise BackendError("the shape of an output depends on data")
        stream.synchronize()  # work under way must not become part of the graph
        return self._device.capture(lambda: self._launch(self.stream), self.stream)

    def _remember(self, shapes: tuple[Shape, ...], graph: Graph | None) -> None:
        self._graphs[shapes] = graph
        self._graphs.move_to_end(shapes)
        if len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)

    def _launch(self, stream: Stream) -> None:
        if not self._context.execute_async_v3(stream.handle):
            raise BackendError("the engine failed to run")

    def attach(self, profiler: Any) -> None:
        """Report the time of each layer to an IProfiler; None ends that. Meanwhile runs are slower, and use no graphs."""
        if profiler is not None:
            self._graphs_usual, self._graphs_wanted = self._graphs_wanted, False
        else:
            self._graphs_wanted = self._graphs_usual
        self._context.profiler = profiler

    def close(self) -> None:
        """Wait for the work under way, and release the context and all memory."""
        self.stream.synchronize()
        if self._busy_on is not None:
            self._event.hold(self.stream)
            self.stream.synchronize()
        self._graphs.clear()
        self._buffers.clear()
        self._allocators.clear()
        del self._context


def _nbytes(shape: Shape, dtype: np.dtype[Any]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize
