"""`tensorrt` and `tensorrt_rtx` on the simulator: runtime, engines, contexts; everything else is tensorrt_rtx's own."""

from __future__ import annotations

import functools
import json
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorrt_rtx

from tests.simulator.contexts import Bound, ExecutionContext
from tests.simulator.errors import CudaError, RuleError
from tests.simulator.memory import Allocation, site
from tests.simulator.plans import Plan
from tests.simulator.work import Stream

if TYPE_CHECKING:
    from tests.simulator.machine import Machine

RTX_ONLY = ("CudaGraphStrategy", "IRuntimeCache", "ComputeCapability", "DynamicShapesKernelSpecializationStrategy")


class TensorRTFront:
    """Stands for the module of a flavour. `engines` are those that were loaded and are still there."""

    def __init__(self, machine: Machine, flavour: str = "tensorrt", version: str = "11.4.0") -> None:
        self.machine = machine
        self.flavour = flavour
        self.__version__ = version
        self.engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self.totals: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        if self.flavour == "tensorrt" and name in RTX_ONLY:
            raise AttributeError(f"module 'tensorrt' has no attribute {name!r}")
        return getattr(tensorrt_rtx, name)

    def Refitter(self, engine: Engine, logger: Any) -> Any:
        from tests.simulator.refitters import Refitter

        return Refitter(engine, logger)

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        from tests.simulator.refitters import OnnxParserRefitter

        self.totals["refitted"] += 1
        return OnnxParserRefitter(refitter, logger)

    def Runtime(self, logger: Any) -> Runtime:
        if not isinstance(logger, tensorrt_rtx.ILogger):
            raise TypeError("__init__(): incompatible constructor arguments: logger")
        return Runtime(self, logger)


class Runtime:
    """Runtime. It has no more attributes than these."""

    __slots__ = ("__weakref__", "_front", "_logger", "engine_host_code_allowed", "max_threads", "temporary_directory")

    def __init__(self, front: TensorRTFront, logger: Any) -> None:
        self._front, self._logger = front, logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
        machine = self._front.machine
        try:
            with machine.inside("deserialize_cuda_engine"):
                plan = Plan(serialized_engine)
                if plan.flavour != self._front.flavour:
                    raise ValueError(f"the plan is one of {plan.flavour}")
                if plan.host_code and not self.engine_host_code_allowed:
                    raise ValueError("the engine has host code, which the runtime does not allow")
                return Engine(self, self._front, plan, self._logger)
        except (ValueError, CudaError) as error:
            self._logger.log(tensorrt_rtx.ILogger.Severity.ERROR, f"IRuntime::deserializeCudaEngine: {error}")
            return None


class Engine:
    """ICudaEngine, on the GPU that the thread had. contexts: how many were made; graphs: how often RTX captured one."""

    def __init__(self, runtime: Runtime, front: TensorRTFront, plan: Plan, logger: Any) -> None:
        self.machine = front.machine
        self.device = front.machine.here.device
        self.plan = plan
        self.contexts = 0
        self.graphs = 0
        self._runtime = runtime
        self._front = front
        self._logger = logger
        self._captured: dict[int, Any] = {}
        self.weights = self.allocate(max(len(plan.model), 1), "the weights of an engine")
        front.engines.add(self)

    def __del__(self) -> None:
        if hasattr(self, "weights"):
            self.machine.dropped.append(functools.partial(self.free, self.weights))

    def log(self, reason: str) -> None:
        self._logger.log(tensorrt_rtx.ILogger.Severity.ERROR, reason)

    def allocate(self, nbytes: int, label: str) -> Allocation:
        self.machine.unsafe("cudaMalloc")
        space = self.machine.space
        return space.own(space.segment(nbytes, self.device), nbytes, self.device, f"{label} at {site()}")

    def free(self, owner: Allocation) -> None:
        """Nothing may be at work with a context or an engine when it is destroyed."""
        if self.machine.sticky is None:
            try:
                owner.segment.check(0, owner.segment.size, True, self.machine.host, f"the destruction of {owner.label}")
            except RuleError as error:
                self.machine.blame(error)
        owner.freed = "TensorRT"
        self.machine.space.release(owner.segment, owner.device)

    # What is in it.

    @property
    def num_io_tensors(self) -> int:
        return len(self.plan.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return max(len(self.plan.profiles), 1)

    @property
    def num_layers(self) -> int:
        return len(self.plan.nodes)

    @property
    def device_memory_size_v2(self) -> int:
        return self.plan.workspace

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self.plan.workspace

    def get_tensor_name(self, index: int) -> str:
        return self.plan.tensors[index].name

    def get_tensor_mode(self, name: str) -> Any:
        modes = tensorrt_rtx.TensorIOMode
        tensor = self.plan.tensor(name)
        return modes.NONE if tensor is None else modes.INPUT if tensor.is_input else modes.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        places = tensorrt_rtx.TensorLocation
        return places.HOST if name in self.plan.host else places.DEVICE

    def is_shape_inference_io(self, name: str) -> bool:
        return name in self.plan.host

    def get_tensor_dtype(self, name: str) -> Any:
        tensor = self.plan.tensor(name)
        assert tensor is not None
        return getattr(tensorrt_rtx.DataType, _TYPES[tensor.kind])

    def get_tensor_shape(self, name: str) -> Any:
        tensor = self.plan.tensor(name)
        assert tensor is not None
        return tensorrt_rtx.Dims([size if isinstance(size, int) else -1 for size in tensor.shape])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return [tensorrt_rtx.Dims(shape) for shape in self.plan.profiles[profile_index][name]]

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self)

    # Contexts.

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> ExecutionContext | None:
        config = strategy if isinstance(strategy, RuntimeConfig) else runtime_config
        with self.machine.inside("create_execution_context"):
            if self.machine.here.device != self.device:
                raise RuleError(
                    f"a context for cuda:{self.device} is made while the thread is on cuda:{self.machine.here.device}"
                )
            try:
                return ExecutionContext(self, config)
            except CudaError as error:
                self.log(f"createExecutionContext: {error.name}")
                return None

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self._front, self.device)

    def note_graph(self, context: ExecutionContext, stream: Stream, bound: Bound, addresses: Any) -> None:
        """RTX with its own graphs captures anew whenever shapes or addresses change, and not at all on the default stream."""
        config = context._config
        if config is None:
            return
        config.check_cache()
        if config.cuda_graph_strategy != tensorrt_rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE or stream.legacy:
            return
        if self._captured.get(id(context)) != (bound, addresses):
            self._captured[id(context)] = (bound, addresses)
            self.graphs += 1


_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16"}
"""Names of DataType by `onnx.TensorProto.DataType`."""


class Inspector:
    """EngineInspector: a layer for each ONNX node."""

    __slots__ = ("_engine", "error_recorder", "execution_context")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.execution_context: ExecutionContext | None = None

    def get_engine_information(self, format: Any) -> str:  # noqa: A002
        layers = [
            {"Name": name, "LayerType": operator, "Metadata": f"[ONNX Layer: {name}]", "Inputs": [], "Outputs": []}
            for name, operator in self._engine.plan.nodes
        ]
        return json.dumps({"Layers": layers})


class RuntimeConfig:
    """IRuntimeConfig of TensorRT-RTX. It does not keep its cache alive, and crashes the process where that is gone."""

    __slots__ = ("_cache", "_device", "_front", "cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy")

    def __init__(self, front: TensorRTFront, device: int) -> None:
        self._front = front
        self._device = device
        self._cache: Callable[[], RuntimeCache | None] | None = None
        self.cuda_graph_strategy = tensorrt_rtx.CudaGraphStrategy.DISABLED

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._front, self._device)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self._cache = weakref.ref(cache)
        return True

    def get_runtime_cache(self) -> RuntimeCache | None:
        self.check_cache()
        return None if self._cache is None else self._cache()

    def check_cache(self) -> None:
        if self._cache is not None and self._cache() is None:
            raise RuleError("the runtime cache was dropped while a configuration uses it")


class RuntimeCache:
    """IRuntimeCache. Its calls need the CUDA context of its GPU, as CUDA's own do."""

    def __init__(self, front: TensorRTFront, device: int) -> None:
        self._front = front
        self._device = device
        self._kernels = b""

    def _check(self) -> None:
        if self._front.machine.here.device != self._device:
            error = RuleError(f"a runtime cache of cuda:{self._device} is used while another GPU is current")
            self._front.machine.blame(error)
            raise error

    def deserialize(self, blob: Any) -> bool:
        self._check()
        self._front.totals["cache read"] += 1
        self._kernels = bytes(blob)
        return bytes(blob).startswith(b"kernels")

    def serialize(self) -> bytes:
        self._check()
        self._front.totals["cache written"] += 1
        return self._kernels or b"kernels"

    def reset(self) -> bool:
        self._kernels = b""
        return True
