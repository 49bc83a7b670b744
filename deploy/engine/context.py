"""An execution context of an engine, with its stream, buffers and CUDA graph: everything that one run needs for itself."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar, cast

import numpy as np

from deploy.artifact.tensors import TensorSpec, format_shape
from deploy.engine.buffers import Buffers
from deploy.engine.cuda import Device, DeviceLostError, Event, Memory, Stream
from deploy.engine.replay import Replay
from deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger("deploy.runtime")

ALIGNMENT = 256
"""The address of a tensor must be a multiple of this many bytes (IExecutionContext::setTensorAddress)."""

Shape = tuple[int, ...]

Place = Callable[[int, Shape], tuple[int, Any]]
"""Takes the index of an output and its shape; the device address that it is to be written to, and the array that is there."""

P = ParamSpec("P")
T = TypeVar("T")


class _Tensor(NamedTuple):
    """An input or output. dtype: None for bfloat16, which numpy lacks. itemsize: bytes."""

    name: str
    dtype: np.dtype[Any] | None
    itemsize: int


def _guarded(
    label: str,
) -> Callable[[Callable[Concatenate["EngineContext", P], T]], Callable[Concatenate["EngineContext", P], T]]:
    """Makes the GPU that of the thread, an NVTX range of that name, and puts the context in order if the method fails."""

    def decorated(method: Callable[Concatenate["EngineContext", P], T]) -> Callable[Concatenate["EngineContext", P], T]:
        def call(self: "EngineContext", /, *args: P.args, **kwargs: P.kwargs) -> T:
            try:
                with self._device.active():
                    if self._annotate is None:
                        return method(self, *args, **kwargs)
                    with self._annotate(label):
                        return method(self, *args, **kwargs)
            except BaseException as error:
                self.recover(error)
                raise

        call.__doc__ = method.__doc__
        return call

    return decorated


class EngineContext:
    """An execution context, for one run at a time. Raises BackendError if CUDA or the engine fails; it stays usable.

    All its work is queued on its own `stream`, so that what it reuses is used in order: a caller's stream is waited for before a
    run, and waits for its end. TensorRT would have to synchronize the whole GPU on the default stream, which most callers use.

    `lost` is set once CUDA has failed for good. Later calls then raise DeviceLostError.

    context: an IExecutionContext of either flavour. host: the inputs that the engine reads from host memory, because shapes
    depend on their values. graphs: replay a CUDA graph from the second run in a row with the same shapes on: captured here
    (`own`), or by TensorRT-RTX itself (`tensorrt`); both want addresses that never change. allocator: makes an IOutputAllocator for
    an output whose shape depends on data; see `make_allocator`. reason: what TensorRT said last. annotate: makes an NVTX range.
    """

    def __init__(
        self,
        context: "tensorrt.IExecutionContext",
        device: Device,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        host: frozenset[str],
        graphs: Literal["own", "tensorrt"] | None,
        allocator: Callable[[Device, Stream], Any],
        reason: Callable[[], str],
        annotate: Callable[[str], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.lost: DeviceLostError | None = None
        self._context: tensorrt.IExecutionContext | None = context
        self._device = device
        self._inputs = [_tensor(spec) for spec in inputs]
        self._outputs = [_tensor(spec) for spec in outputs]
        self._host_inputs: dict[str, np.ndarray] = dict.fromkeys(host, np.empty(0))
        self._fixed = graphs is not None
        self._captures = graphs == "own"
        self._make_allocator = allocator
        self._reason = reason
        self._annotate = annotate
        with device.active():
            self.stream: Stream = device.stream()
            self._ready: Event = device.event()
            self._done: Event = device.event()
        self._buffers = Buffers(device, self.stream)
        self._addresses: dict[str, int] = {}
        self._profile: int | None = None
        self._bound: tuple[Any, ...] | None = None  # profile, shapes and the values of host inputs
        self._shapes: list[Shape | None] = []
        self._allocators: dict[str, Any] = {}
        self._replay = Replay(device, self.stream, wanted=graphs == "own")
        self._pending: list[tuple[np.ndarray, Shape, np.dtype[Any]]] = []

    @property
    def shapes(self) -> tuple[Shape, ...] | None:
        """Those of the inputs of the last run; None before the first, and after a failure."""
        return None if self._bound is None else self._bound[1]

    # Arrays in host memory: begin, finish.

    @_guarded("deploy: stage and enqueue")
    def begin(self, feed: Mapping[str, np.ndarray], profile: int) -> None:
        """Stage the inputs, and queue all work, including the copies of the outputs."""
        values = {name: feed[name] for name in self._host_inputs}
        self._bind(profile, tuple([feed[tensor.name].shape for tensor in self._inputs]), values)
        for tensor in self._inputs:
            if tensor.name not in values:
                self._set_address(tensor.name, self._buffers.stage(tensor.name, feed[tensor.name]).pointer)
        for tensor, shape in zip(self._outputs, self._shapes, strict=True):
            if shape is not None:
                self._set_address(tensor.name, self._buffers.memory(tensor.name, _nbytes(shape, tensor)).pointer)
        self._execute()
        if None in self._shapes:
            self.stream.synchronize()
        self._pending = []
        for index, tensor in enumerate(self._outputs):
            memory, shape = self._result(index)
            assert tensor.dtype is not None
            host = self._buffers.host(tensor.name, _nbytes(shape, tensor))
            if host.size:
                memory.read(host, self.stream)
            self._pending.append((host, shape, tensor.dtype))

    def finish(self) -> list[np.ndarray]:
        """Wait for the run that was begun; the outputs, in new arrays."""
        self.wait()
        pending, self._pending = self._pending, []
        return [host.view(dtype).reshape(shape).copy() for host, shape, dtype in pending]

    @_guarded("deploy: wait")
    def wait(self) -> None:
        """Wait until all work is done."""
        self.stream.synchronize()

    @_guarded("deploy: time")
    def times(self, feed: Mapping[str, np.ndarray], profile: int) -> tuple[float, float, float] | None:
        """The milliseconds of the copies in, the run and the copies out, one after the other, by events on the GPU.

        None if the shape of an output depends on data: its copy cannot be queued in advance.
        """
        self.begin(feed, profile)
        self.finish()  # the inputs are staged now, so that only the copies are timed
        if None in self._shapes:
            return None
        sizes = {tensor.name: feed[tensor.name].nbytes for tensor in self._inputs if tensor.name not in self._host_inputs}
        marks = [self._device.event(timed=True) for _ in range(4)]
        marks[0].record(self.stream)
        for name, nbytes in sizes.items():
            self._buffers.memory(name, nbytes).write(self._buffers.host(name, nbytes), self.stream)
        marks[1].record(self.stream)
        self._execute()
        marks[2].record(self.stream)
        for tensor, shape in zip(self._outputs, self._shapes, strict=True):
            if shape is not None and (nbytes := _nbytes(shape, tensor)):
                self._buffers.memory(tensor.name, nbytes).read(self._buffers.host(tensor.name, nbytes), self.stream)
        marks[3].record(self.stream)
        self.stream.synchronize()
        first, second, third = (after.since(before) for before, after in itertools.pairwise(marks))
        return first, second, third

    # Arrays in device memory.

    @_guarded("deploy: enqueue")
    def run(
        self,
        inputs: Sequence[int],
        shapes: tuple[Shape, ...],
        profile: int,
        callers: Sequence[Stream],
        place: Place,
        values: Mapping[str, np.ndarray],
        wait: bool,
    ) -> list[Any]:
        """Queue a run on inputs at device addresses, after what the `callers` were given before; the arrays of the outputs.

        What `place` gives must be ready for use on the streams of the callers. values: the host inputs, whose addresses do not
        matter. wait: return once the work is done. Otherwise all `callers` wait for its end, and it returns at once, but for
        outputs whose shape depends on data.
        """
        self._bind(profile, shapes, values)
        places = [None if shape is None else place(index, shape) for index, shape in enumerate(self._shapes)]
        self._wait_for(callers)
        addresses = self._addresses
        for tensor, pointer, shape in zip(self._inputs, inputs, shapes, strict=True):
            if tensor.name in values:
                continue
            if self._fixed or not pointer or pointer % ALIGNMENT:
                nbytes = _nbytes(shape, tensor)
                memory = self._buffers.memory(tensor.name, nbytes)
                self._copy(memory.pointer, pointer, nbytes)
                pointer = memory.pointer
            if addresses.get(tensor.name) != pointer:
                self._set_address(tensor.name, pointer)
        staged = []
        for index, placed in enumerate(places):
            if placed is None:
                staged.append(index)
                continue
            tensor, pointer = self._outputs[index], placed[0]
            if self._fixed or not pointer or pointer % ALIGNMENT:
                pointer = self._buffers.memory(tensor.name, _nbytes(cast(Shape, self._shapes[index]), tensor)).pointer
                staged.append(index)
            if addresses.get(tensor.name) != pointer:
                self._set_address(tensor.name, pointer)
        self._execute()
        if staged:
            places = self._copy_out(staged, places, callers, place)
        if wait:
            self.stream.synchronize()
        else:
            self._done.record(self.stream)
            for caller in callers:
                self._done.hold(caller)
        return [placed[1] for placed in places if placed is not None]

    def _copy_out(
        self, staged: Sequence[int], places: Sequence[tuple[int, Any] | None], callers: Sequence[Stream], place: Place
    ) -> list[tuple[int, Any] | None]:
        """Copy outputs out of buffers and allocators; the places of all, also of those whose shapes are known only now."""
        places = list(places)
        if None in places:
            self.stream.synchronize()
            for index, placed in enumerate(places):
                places[index] = placed or place(index, self._result(index)[1])
            self._wait_for(callers)
        for index in staged:
            memory, shape = self._result(index)
            placed = places[index]
            assert placed is not None
            self._copy(placed[0], memory.pointer, _nbytes(shape, self._outputs[index]))
        return places

    def _wait_for(self, callers: Sequence[Stream]) -> None:
        for caller in callers:
            self._ready.record(caller)
            self._ready.hold(self.stream)

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        if nbytes:
            self._device.copy(target, source, nbytes, self.stream)

    # Both.

    def _bind(self, profile: int, shapes: tuple[Shape, ...], values: Mapping[str, np.ndarray]) -> None:
        """Tell the context what it will run with. A graph holds for what was bound when it was captured, and no longer."""
        bound: tuple[Any, ...] = (profile, shapes)
        if values:
            bound += tuple(values[name].tobytes() for name in self._host_inputs)
        if self._bound == bound:
            return
        context = self._trt_context()
        self._bound = None
        self._replay.drop()
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, self.stream.handle):
                raise BackendError(f"the engine refused its profile {profile}: {self._reason()}")
            self._profile = profile
            self._addresses.clear()  # nothing says that they outlive a change of the profile
        for tensor, shape in zip(self._inputs, shapes, strict=True):
            if not context.set_input_shape(tensor.name, tuple(shape)):
                raise InputError(f"the engine refused shape {format_shape(shape)} for {tensor.name!r}: {self._reason()}")
        if values:
            self.stream.synchronize()  # the last run may still read the values before
            for name in self._host_inputs:
                self._host_inputs[name] = values[name].copy()
                self._addresses.pop(name, None)
                self._set_address(name, self._host_inputs[name].ctypes.data)
        known = [tuple(cast(Sequence[int], context.get_tensor_shape(tensor.name))) for tensor in self._outputs]
        self._shapes = [None if any(size < 0 for size in shape) else shape for shape in known]
        self._set_allocators(context)
        self._bound = bound

    def _set_address(self, name: str, pointer: int) -> None:
        if self._addresses.get(name) == pointer:
            return
        if not self._trt_context().set_tensor_address(name, pointer):
            raise BackendError(f"the engine refused the address of {name!r}: {self._reason()}")
        self._addresses[name] = pointer
        self._replay.drop()

    def _set_allocators(self, context: "tensorrt.IExecutionContext") -> None:
        for tensor, shape in zip(self._outputs, self._shapes, strict=True):
            if shape is None and tensor.name not in self._allocators:
                allocator = self._make_allocator(self._device, self.stream)
                if not context.set_output_allocator(tensor.name, allocator):
                    raise BackendError(
                        f"the engine refused an allocator for {tensor.name!r}, whose shape depends on data: {self._reason()}"
                    )
                self._allocators[tensor.name] = allocator
                if self._captures:
                    logger.warning("no CUDA graph: the shape of %r depends on data; it runs without", tensor.name)

    def _result(self, index: int) -> tuple[Memory, Shape]:
        """The memory of an output in a buffer or of an allocator, and its shape; for the latter once the run is done."""
        name, shape = self._outputs[index].name, self._shapes[index]
        if shape is None:
            allocator = self._allocators[name]
            return allocator.memory, allocator.shape
        return self._buffers.memory(name), shape

    def _execute(self) -> None:
        if not self._captures or None in self._shapes:  # whose shapes are waited for
            self._launch()
        else:
            self._replay.run(self._launch, self._bound, self._shown)

    def _shown(self) -> str:
        assert self._bound is not None
        return "; ".join(format_shape(shape) for shape in self._bound[1])

    def _launch(self) -> None:
        assert self._context is not None
        if not bool(self._context.execute_async_v3(self.stream.handle)):
            for allocator in self._allocators.values():
                error, allocator.error = allocator.error, None
                if error is not None:
                    raise error
            raise BackendError(f"the engine failed to run: {self._reason()}")

    def _trt_context(self) -> "tensorrt.IExecutionContext":
        assert self._context is not None, "closed"
        return self._context

    def attach(self, profiler: Any) -> None:
        """Report the time of each layer to an IProfiler; None ends that. Meanwhile runs are slower, and use no graphs."""
        self._replay.wanted = self._captures and profiler is None
        self._replay.drop()
        self._trt_context().profiler = profiler

    # The end.

    def recover(self, error: BaseException) -> None:
        """After a failure: wait until nothing is under way. If CUDA fails even then, raise DeviceLostError.

        What CUDA answers to every later call it says of itself: "This leaves the process in an inconsistent state and any further
        CUDA work will return the same error" (driver_types.h).
        """
        self._bound = self._profile = None
        self._addresses.clear()
        self._replay.drop()
        self._pending = []
        if self.lost is None:
            try:
                with self._device.active():
                    self.stream.synchronize()
            except BackendError:
                self.lost = error if isinstance(error, DeviceLostError) else DeviceLostError(str(error))
        if self.lost is not None:
            raise DeviceLostError(self.lost.reason) from error

    def settle(self) -> None:
        """Wait until nothing is under way, and drop the outputs of a run that was begun. A failure is left to who comes next."""
        self._pending = []
        with suppress(BackendError):
            self.wait()

    def close(self) -> None:
        """Wait for the work under way, and release the context and all memory: also if the wait fails, whose error is raised then."""
        try:
            if self.lost is None:
                self.wait()
        finally:
            self._replay.drop()
            self._context = None
            self._allocators.clear()
            self._buffers.clear()


def _tensor(spec: TensorSpec) -> _Tensor:
    dtype = None if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
    return _Tensor(spec.name, dtype, 2 if dtype is None else dtype.itemsize)


def _nbytes(shape: Shape, tensor: _Tensor) -> int:
    count = tensor.itemsize
    for size in shape:
        count *= size
    return count
