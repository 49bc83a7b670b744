"""Rules of TensorRT's execution contexts. On a real GPU the engine `y = 2 x` is built for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.simulator.rules.probe import Here, probe

CONTEXT = "NvInferRuntime.h: IExecutionContext"
ALLOCATOR = "NvInferRuntime.h: IOutputAllocator"
LARGEST = 8
RANGES = [{"x": ((low, 4), (low, 4), (high, 4))} for low, high in ((1, 4), (2, LARGEST))]


class _Engine:
    """An engine in memory, with input and output buffers for its largest shape."""

    def __init__(self, here: Here, outputs: tuple[str, ...] = ("y",)) -> None:
        from tests.simulator.artifacts import model  # which needs onnx: the other probes do without

        trt = self.trt = here.trt
        self.here = here
        self.logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(self._plan(model(outputs)))
        assert self.engine is not None
        self.x, self.y = here.memory(0, 1 << 12), here.memory(0, 1 << 12)

    def _plan(self, content: bytes) -> Any:
        if self.here.make_plan is not None:
            return self.here.make_plan(content, RANGES)
        trt = self.trt
        builder = trt.Builder(self.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.logger)
        assert parser.parse(content)
        config = builder.create_builder_config()
        for ranges in RANGES:
            profile = builder.create_optimization_profile()
            profile.set_shape("x", *ranges["x"])
            config.add_optimization_profile(profile)
        return builder.build_serialized_network(network, config)

    def context(self, rows: int = 0) -> Any:
        """A context, bound to the buffers and, where `rows` is given, to that shape."""
        context = self.engine.create_execution_context()
        assert context.set_tensor_address("x", self.x)
        assert context.set_tensor_address("y", self.y)
        if rows:
            assert context.set_input_shape("x", (rows, 4))
        return context

    def put(self, value: float, stream: int) -> None:
        """Fill the input."""
        host = np.full(LARGEST * 4, value, np.float32)
        kind = self.here.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.here.do("cudaMemcpyAsync", self.x, host.ctypes.data, host.nbytes, kind, stream)

    def get(self, rows: int, stream: int) -> np.ndarray:
        host = np.zeros((rows, 4), np.float32)
        kind = self.here.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.here.do("cudaMemcpyAsync", host.ctypes.data, self.y, host.nbytes, kind, stream)
        self.here.do("cudaStreamSynchronize", stream)
        return host


@probe("tensorrt", CONTEXT + "::enqueueV3")
def a_run_needs_shapes_and_addresses(here: Here) -> None:
    made, a = _Engine(here), here.stream()
    assert not made.context().execute_async_v3(a)
    bare = made.engine.create_execution_context()
    assert bare.set_input_shape("x", (1, 4))
    assert not bare.execute_async_v3(a)
    assert bare.set_tensor_address("x", made.x)
    assert not bare.execute_async_v3(a)
    assert bare.set_tensor_address("y", made.y)
    assert bare.execute_async_v3(a)
    here.do("cudaStreamSynchronize", a)


@probe("tensorrt", CONTEXT + "::setInputShape, setTensorAddress, setOptimizationProfileAsync")
def what_does_not_fit_is_refused(here: Here) -> None:
    made, a = _Engine(here), here.stream()
    context = made.context()
    assert not context.set_input_shape("x", (5, 4))  # the first profile ends at 4
    assert not context.set_input_shape("x", (1, 3))
    assert not context.set_input_shape("z", (1, 4))
    assert not context.set_tensor_address("z", made.x)
    assert not context.set_optimization_profile_async(2, a)


@probe("tensorrt", CONTEXT + "::enqueueV3")
def a_run_is_work_on_its_stream(here: Here) -> None:
    made, a, event = _Engine(here), here.stream(), here.event()
    context = made.context(2)
    assert context.execute_async_v3(a)
    here.prepare()
    here.busy(a)
    made.put(3, a)
    assert context.execute_async_v3(a)
    here.do("cudaEventRecord", event, a)
    assert here.ask("cudaEventQuery", event).name == "cudaErrorNotReady"
    np.testing.assert_array_equal(made.get(2, a), np.full((2, 4), 6))


@probe("tensorrt", CONTEXT + "::enqueueV3: its warning of the default stream")
def a_run_on_the_default_stream_waits(here: Here) -> None:
    made, event = _Engine(here), here.event()
    context = made.context(2)
    assert context.execute_async_v3(0)
    here.prepare()
    here.busy(0)
    assert context.execute_async_v3(0)
    here.do("cudaEventRecord", event, 0)
    assert here.ask("cudaEventQuery", event).name == "cudaSuccess"


@probe("tensorrt", CONTEXT + "::setOptimizationProfileAsync")
def after_a_change_of_profile_shapes_are_set_anew_and_addresses_stay(here: Here) -> None:
    made, a = _Engine(here), here.stream()
    context = made.context(2)
    made.put(1, a)
    assert context.execute_async_v3(a)
    assert context.set_optimization_profile_async(1, a)
    assert not context.execute_async_v3(a)
    assert context.set_input_shape("x", (8, 4))
    assert context.get_tensor_address("x") == made.x
    assert context.execute_async_v3(a)
    np.testing.assert_array_equal(made.get(8, a), np.full((8, 4), 2))


@probe("tensorrt", "TensorRT Developer Guide, CUDA Graphs; github.com/NVIDIA/TensorRT/issues/3798")
def a_run_is_captured_after_a_plain_one_and_replays_its_shape(here: Here) -> None:
    made, a = _Engine(here), here.stream()
    context = made.context(2)
    made.put(1, a)
    assert context.execute_async_v3(a)
    here.do("cudaStreamSynchronize", a)
    here.begin(a)
    assert context.execute_async_v3(a)
    graph = here.end(a)
    made.put(5, a)
    here.do("cudaGraphLaunch", graph, a)
    np.testing.assert_array_equal(made.get(2, a), np.full((2, 4), 10))


@probe("tensorrt", CONTEXT + ": several may run at once")
def contexts_of_one_engine_share_a_profile(here: Here) -> None:
    made, a = _Engine(here), here.stream()
    contexts = [made.context(2), made.context(3)]
    made.put(1, a)
    for context, rows in zip(contexts, (2, 3), strict=True):
        assert context.execute_async_v3(a)
        np.testing.assert_array_equal(made.get(rows, a), np.full((rows, 4), 2))


@probe("tensorrt", ALLOCATOR)
def memory_for_a_shape_that_depends_on_data_is_asked_for_in_the_run(here: Here) -> None:
    made, a = _Engine(here, ("y", "positive")), here.stream()
    asked: list[int] = []
    told: list[tuple[int, ...]] = []

    class Allocator(here.trt.IOutputAllocator):  # type: ignore[misc,name-defined]
        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            asked.append(size)
            return made_memory

        def notify_shape(self, name: str, shape: Any) -> None:
            told.append(tuple(shape))

    made_memory, allocator, context = here.memory(0, 1 << 12), Allocator(), made.context(2)
    assert tuple(context.get_tensor_shape("positive")) == (-1,)
    assert context.set_output_allocator("positive", allocator)
    for value, count in ((1.0, 8), (-1.0, 0)):
        made.put(value, a)
        assert context.execute_async_v3(a)
        assert min(asked) > 0
        assert told[-1] == (count,)
        here.do("cudaStreamSynchronize", a)
    assert len(asked) == 2


@probe("tensorrt", "NvInferRuntime.h: IOutputAllocator::notifyShape is called before enqueueV3 returns")
def a_run_whose_output_depends_on_data_is_not_captured(here: Here) -> None:
    made, a = _Engine(here, ("y", "positive")), here.stream()

    class Allocator(here.trt.IOutputAllocator):  # type: ignore[misc,name-defined]
        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return made_memory

        def notify_shape(self, name: str, shape: Any) -> None:
            pass

    made_memory, allocator, context = here.memory(0, 1 << 12), Allocator(), made.context(2)
    assert context.set_output_allocator("positive", allocator)
    assert context.execute_async_v3(a)
    here.do("cudaStreamSynchronize", a)
    here.begin(a)
    ran = context.execute_async_v3(a)
    assert not (ran and here.ask("cudaStreamEndCapture", a).name == "cudaSuccess")
    if not ran:
        here.ask("cudaStreamEndCapture", a)


@probe("tensorrt", "NvInferRuntime.h: IRuntime::deserializeCudaEngine")
def what_is_no_plan_is_refused(here: Here) -> None:
    made = _Engine(here)
    assert made.runtime.deserialize_cuda_engine(b"no plan at all") is None
