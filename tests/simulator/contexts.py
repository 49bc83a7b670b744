"""Execution contexts: what a run depends on, and when what was set takes effect."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorrt_rtx

from tests.simulator.errors import CudaError, RuleError
from tests.simulator.memory import Allocation
from tests.simulator.plans import Shape, Tensor
from tests.simulator.work import Action, Stream, Use

if TYPE_CHECKING:
    from tests.simulator.tensorrt_front import Engine

ALIGNMENT = 256
Bound = tuple[int, tuple[Shape, ...]]


@dataclass
class _Life:
    """What graphs ask about their context: whether it is there, and what it ran last."""

    alive: bool = True
    enqueued: Bound | None = None


class ExecutionContext:
    """IExecutionContext. Its state is memory that every run writes: runs that are not ordered are found by that."""

    def __init__(self, engine: Engine, config: Any) -> None:
        self._engine = engine
        self._plan = engine.plan
        self._machine = engine.machine
        self._config = config
        self._workspace: Allocation = engine.allocate(max(engine.plan.workspace, 1), "the workspace of a context")
        self._inputs = [tensor for tensor in self._plan.tensors if tensor.is_input]
        self._outputs = [tensor for tensor in self._plan.tensors if not tensor.is_input]
        self._profile = 0
        self._shapes: dict[str, Shape] = {t.name: t.shape for t in self._inputs if all(isinstance(n, int) for n in t.shape)}  # type: ignore[misc]
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, weakref.ref[Any]] = {}
        self._life = _Life()
        self.profiler: Any = None
        self.name = ""
        self.enqueue_emits_profile = True
        self.nvtx_verbosity: Any = None
        self.error_recorder = None
        engine.contexts += 1
        self._sealed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name[0] != "_" and getattr(self, "_sealed", False) and name not in self.__dict__:
            raise AttributeError(f"'IExecutionContext' object has no attribute {name!r}")
        object.__setattr__(self, name, value)

    def __del__(self) -> None:
        if getattr(self, "_sealed", False):
            self._life.alive = False
            self._machine.dropped.append(functools.partial(self._engine.free, self._workspace))

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    # What a run is bound to.

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Work on the stream: a run on another stream must come after it. It takes effect with the next run."""
        with self._machine.inside("set_optimization_profile_async"):
            if not 0 <= profile_index < max(len(self._plan.profiles), 1):
                return self._refuse(f"profile index {profile_index} is out of range")
            if profile_index != self._profile:
                self._profile = profile_index
                self._shapes = {t.name: self._shapes[t.name] for t in self._inputs if all(isinstance(n, int) for n in t.shape)}
                self._machine.put(
                    self._machine.stream(int(stream_handle)),
                    Action("set_optimization_profile_async", self._workspace_use(), kernel=True),
                )
            return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if not isinstance(shape, (tuple, list, tensorrt_rtx.Dims)):
            raise TypeError(f"set_input_shape(): incompatible function arguments: {name!r}, {shape!r}")
        tensor, given = self._plan.tensor(name), tuple(int(size) for size in shape)
        if tensor is None or not tensor.is_input:
            return self._refuse(f"{name} is no input")
        low, _, high = (self._plan.profiles[self._profile] if self._plan.profiles else {}).get(name, [tensor.shape] * 3)
        if len(given) != len(low) or not all(a <= b <= c for a, b, c in zip(low, given, high, strict=True)):  # type: ignore[operator]
            return self._refuse(f"{given} for {name} is not within {low} and {high} of profile {self._profile}")
        self._shapes[name] = given
        return True

    def get_tensor_shape(self, name: str) -> Any:
        tensor = self._plan.tensor(name)
        if tensor is None:
            raise ValueError(f"there is no tensor {name}")
        if tensor.is_input:
            found = self._shapes.get(name, tuple(n if isinstance(n, int) else -1 for n in tensor.shape))
        else:
            found = self._plan.output_shape(tensor, self._shapes)
        return tensorrt_rtx.Dims(found)

    def infer_shapes(self) -> list[str]:
        return [tensor.name for tensor in self._inputs if tensor.name not in self._shapes]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        tensor, address = self._plan.tensor(name), int(memory)
        if tensor is None:
            return self._refuse(f"there is no tensor {name}")
        if address % ALIGNMENT and name not in self._plan.host:
            return self._refuse(f"the address {address:#x} of {name} is not aligned to {ALIGNMENT} bytes")
        self._addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        if not isinstance(output_allocator, tensorrt_rtx.IOutputAllocator):
            raise TypeError("set_output_allocator(): incompatible function arguments")
        tensor = self._plan.tensor(name)
        if tensor is None or tensor.is_input:
            return self._refuse(f"{name} is no output")
        self._allocators[name] = weakref.ref(output_allocator)
        return True

    # A run.

    def execute_async_v3(self, stream_handle: int) -> bool:
        try:
            with self._machine.inside("execute_async_v3"):
                return self._execute(int(stream_handle))
        except CudaError as error:
            return self._refuse(f"Cuda Runtime ({error.name})")

    def _execute(self, handle: int) -> bool:
        machine = self._machine
        if machine.here.device != self._engine.device:
            raise RuleError(f"an engine of cuda:{self._engine.device} runs while the thread is on cuda:{machine.here.device}")
        if not self._plan.ready:
            raise RuleError("an engine without weights runs")
        if missing := self.infer_shapes():
            return self._refuse(f"the shapes of {', '.join(missing)} are not set")
        stream = machine.stream(handle)
        by_allocator = [tensor for tensor in self._outputs if tensor.name in self._allocators]
        for tensor in self._plan.tensors:
            if not self._addresses.get(tensor.name) and tensor not in by_allocator:
                return self._refuse(f"the address of {tensor.name} is not set")
        bound: Bound = (self._profile, tuple(self._shapes[tensor.name] for tensor in self._inputs))
        if stream.capture is not None and bound != self._life.enqueued:
            raise RuleError("a context is captured that has not run plainly since its shapes or its profile changed")
        if stream.capture is not None and by_allocator:
            stream.capture.invalidate("an output whose shape depends on data is waited for")
            return self._refuse("enqueueV3 synchronizes for outputs whose shape depends on data")
        self._life.enqueued = bound
        self._engine.note_graph(self, stream, bound, tuple(sorted(self._addresses.items())))
        if by_allocator:
            return self._execute_by_allocator(stream, by_allocator)
        machine.put(stream, self._action(bound, captured=stream.capture is not None))
        self._report(stream)
        return True

    def _report(self, stream: Stream) -> None:
        """The default stream, and a profiler, make TensorRT wait for the run."""
        if stream.capture is None and (stream.legacy or self.profiler is not None):
            self._machine.synchronize(stream)
        if stream.capture is None and self.profiler is not None:
            for name, _ in self._plan.nodes:
                self.profiler.report_layer_time(name, 0.25)

    def _workspace_use(self) -> tuple[Use, ...]:
        return (Use(self._workspace.address, self._workspace.nbytes, True),)

    def _use(self, tensor: Tensor, shape: Shape, write: bool) -> Use:
        return Use(self._addresses[tensor.name], int(np.prod(shape)) * tensor.itemsize, write)

    def _given(self) -> tuple[dict[str, tuple[int, Shape]], list[Use], list[Any]]:
        """Addresses and shapes of the inputs, their uses, and copies of those in host memory, which are read at once."""
        inputs, uses, copies = {}, [], []
        for tensor in self._inputs:
            shape, address = self._shapes[tensor.name], self._addresses[tensor.name]
            if tensor.name in self._plan.host:
                copies.append(ctypes.create_string_buffer(ctypes.string_at(address, int(np.prod(shape)) * tensor.itemsize)))
                address = ctypes.addressof(copies[-1])
            else:
                uses.append(self._use(tensor, shape, write=False))
            inputs[tensor.name] = (address, shape)
        return inputs, uses, copies

    def _action(self, bound: Bound, *, captured: bool) -> Action:
        inputs, uses, kept = self._given()
        outputs = {}
        for tensor in self._outputs:
            shape = self._plan.output_shape(tensor, self._shapes)
            if min(shape, default=0) < 0:
                raise RuleError(f"{tensor.name}, whose shape depends on data, has an address and no allocator")
            outputs[tensor.name] = (self._addresses[tensor.name], shape)
            uses.append(self._use(tensor, shape, write=True))
        weights = self._engine.weights
        every = (*uses, *self._workspace_use(), Use(weights.address, weights.nbytes, False))

        life, plan = self._life, self._plan

        def run(kept: list[Any] = kept) -> None:  # copies of inputs in host memory live as long as this
            plan.compute(inputs, outputs)

        def check() -> None:
            if not life.alive:
                raise RuleError("a graph is launched whose execution context was destroyed")
            if life.enqueued != bound:
                raise RuleError(
                    f"a graph is launched whose context was captured with {bound} and has run with {life.enqueued} since"
                )

        return Action("enqueueV3", every, run, check if captured else None, kernel=True)

    def _execute_by_allocator(self, stream: Stream, by_allocator: list[Tensor]) -> bool:
        """TensorRT waits for the shapes, asks for memory, and tells the shape, all before enqueueV3 returns (IOutputAllocator)."""
        machine = self._machine
        inputs, uses, copies = self._given()
        weights = self._engine.weights
        reads = (*uses, *self._workspace_use(), Use(weights.address, weights.nbytes, False))
        machine.put(stream, Action("enqueueV3", reads, kernel=True))
        machine.synchronize(stream)
        found = self._plan.compute(inputs, {})
        del copies
        for tensor in self._outputs:
            value = np.ascontiguousarray(found[tensor.name])
            address = self._addresses.get(tensor.name, 0)
            if tensor in by_allocator:
                allocator = self._allocators[tensor.name]()
                if allocator is None:
                    raise RuleError(f"the output allocator of {tensor.name} was dropped while its context uses it")
                size = max(value.nbytes, 1)
                address = allocator.reallocate_output_async(tensor.name, address, size, ALIGNMENT, stream.handle)
                if not address:
                    return self._refuse(f"no memory for {tensor.name}")
                allocator.notify_shape(tensor.name, tensorrt_rtx.Dims(value.shape))
            if value.nbytes:
                into = machine.space.bytes(address, value.nbytes)
                content = value.reshape(-1).view(np.uint8)
                write = lambda into=into, content=content: into.__setitem__(slice(None), content)  # noqa: E731
                machine.put(stream, Action("enqueueV3", (Use(address, value.nbytes, True),), write, kernel=True))
        self._report(stream)
        return True

    def _refuse(self, reason: str) -> bool:
        self._engine.log(reason)
        return False
