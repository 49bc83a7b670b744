"""An engine in the memory of a GPU, from which execution contexts are made."""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, RUNTIME_CACHE
from deploy.artifact.tensors import TensorSpec
from deploy.engine.callbacks import make_allocator
from deploy.engine.context import EngineContext
from deploy.engine.cuda import Device, DeviceMemoryError
from deploy.engine.flavour import Flavour
from deploy.engine.layers import describe
from deploy.engine.log import make_logger, start
from deploy.engine.refit import refit
from deploy.errors import BackendError
from deploy.host.cache import keep

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger("deploy.runtime")

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
"""By the name of a `DataType` of TensorRT, that of the manifest, where it is not the same in small letters."""


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """How the contexts of an engine run.

    graphs: replay runs as CUDA graphs. kernels: when tensorrt-rtx compiles kernels for a shape that is new: `lazy` beside the runs,
    which use general ones meanwhile, `eager` before the first run, or `none`; other flavours have all of them in the engine.
    annotate: makes the NVTX range of a part of a run from its name; None for no ranges.
    """

    graphs: bool = False
    kernels: Literal["lazy", "eager", "none"] = "lazy"
    annotate: Callable[[str], AbstractContextManager[Any]] | None = None


class LoadedEngine:
    """An ICudaEngine of either flavour, with the TensorRT objects that must live as long as it does.

    plan: the bytes of the engine file. Raises BackendError if TensorRT cannot load the plan, or if its inputs and outputs are not
    those of the artifact's manifest.

    host_inputs: the inputs that the engine reads from host memory, because shapes depend on their values.
    """

    def __init__(self, artifact: Artifact, plan: bytes, flavour: Flavour, gpu: Device, options: ExecutionOptions) -> None:
        self._trt = flavour.trt
        self._gpu = gpu
        self._name = artifact.manifest.name
        self._options = options
        self._inputs = tuple(artifact.manifest.inputs)
        self._outputs = tuple(artifact.manifest.outputs)
        self._log = make_logger(flavour.trt)
        self._making = threading.Lock()
        with gpu.active():
            self._runtime = start(self._trt.Runtime, self._log, f"{flavour.name} {flavour.version}")
            if artifact.manifest.target is not None and artifact.manifest.target.version_compatible:
                self._runtime.engine_host_code_allowed = True  # it holds its own runtime, which TensorRT else refuses to load
            engine: tensorrt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{flavour.name} {flavour.version} cannot load {artifact.location}: {self._log.last()}")
        self._engine = engine
        self.host_inputs = self._check_tensors(artifact.path / ENGINE)
        if artifact.manifest.target is not None and artifact.manifest.target.stripped:
            with gpu.active():
                refit(engine, self._trt, artifact.onnx_path, self._log, str(artifact.location))
        self._cache_file = artifact.path / RUNTIME_CACHE
        self._config: Any = None
        self._cache: Any = None  # the config does not hold the cache: if it were dropped, the process would crash
        if flavour.name == "tensorrt-rtx":
            self._configure_rtx()

    def _check_tensors(self, file: Path) -> frozenset[str]:
        """The engine must have the inputs and outputs of the manifest, with their dtypes. Returns the inputs in host memory."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        expected = _names(self._inputs), _names(self._outputs)
        if (sorted(inputs), sorted(outputs)) != tuple(map(sorted, expected)):
            raise BackendError(
                f"{file} has inputs {', '.join(inputs)} and outputs {', '.join(outputs)}; the manifest lists"
                f" {' and '.join(map(', '.join, expected))}"
            )
        for spec in (*self._inputs, *self._outputs):
            found = engine.get_tensor_dtype(spec.name).name
            if (dtype := _DTYPES.get(found, found.lower())) != spec.dtype:
                raise BackendError(f"{file} has {spec.name!r} in {dtype}; the manifest lists {spec}")
        host = frozenset(name for name in names if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE)
        if wrong := sorted(host & set(outputs)):
            raise BackendError(f"the output {wrong[0]!r} of {self._name!r} is a shape in host memory: not supported")
        return host

    def _configure_rtx(self) -> None:
        """For tensorrt-rtx: the settings of contexts, and what was compiled for this machine in earlier runs."""
        trt: Any = self._trt  # tensorrt-rtx has names that tensorrt lacks
        engine: Any = self._engine
        with self._gpu.active():  # which the cache is compared with
            config = engine.create_runtime_config()
            self._config, self._cache = config, config.create_runtime_cache()
            if self._cache_file.is_file():
                self._cache.deserialize(self._cache_file.read_bytes())  # False if it does not fit: it is then made anew
            config.set_runtime_cache(self._cache)
        strategy = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(strategy, self._options.kernels.upper())
        if self._options.graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE

    def new_context(self) -> EngineContext:
        """A new execution context. Raises DeviceMemoryError if the GPU has no room for it, BackendError if it fails otherwise."""
        with self._making, self._gpu.active():
            context = self._create() or self._create_after_trim()
        graphs: Literal["own", "tensorrt"] = "own" if self._config is None else "tensorrt"
        return EngineContext(
            context,
            self._gpu,
            self._inputs,
            self._outputs,
            host=self.host_inputs,
            graphs=graphs if self._options.graphs else None,
            allocator=_allocators(self._trt),
            reason=self._log.last,
            annotate=self._options.annotate,
        )

    def _create(self) -> "tensorrt.IExecutionContext | None":
        return self._engine.create_execution_context(*(() if self._config is None else (self._config,)))

    def _create_after_trim(self) -> "tensorrt.IExecutionContext":
        """Once more, with what is kept for later given back, if memory was short."""
        needed = self._engine.device_memory_size_v2
        if needed > self._gpu.memory()[0]:
            self._gpu.trim()
            if context := self._create():
                return context
            raise DeviceMemoryError(needed, *self._gpu.memory())
        raise BackendError(f"no execution context for {self._name!r}: {self._log.last()}")

    def information(self) -> str:
        """The inspector's description of the engine at the optimal shapes of its first profile, as JSON."""
        with self._making, self._gpu.active():
            context = self._create()
            return describe(self._engine, context, self._trt, _names(self._inputs))

    def save(self) -> None:
        """Keep what tensorrt-rtx compiled for the next time, unless another process has kept more. Nothing for other flavours."""
        if self._cache is None:
            return
        try:
            with self._gpu.active():
                compiled = bytes(self._cache.serialize())
                kept = self._cache_file.read_bytes() if self._cache_file.is_file() else b""
                if len(kept) > len(compiled) and self._config.create_runtime_cache().deserialize(kept):
                    return
        except BackendError as error:  # as where the GPU is lost
            logger.warning("what tensorrt-rtx compiled cannot be kept: %s", str(error))
            return
        keep(self._cache_file, compiled, "what tensorrt-rtx compiled")

    def close(self) -> None:
        """Let go of the engine, after its contexts."""
        self.save()
        self._config = self._cache = None
        del self._engine, self._runtime


def _allocators(trt: Any) -> Callable[..., Any]:
    return lambda device, stream: make_allocator(trt, device, stream)


def _names(specs: Sequence[TensorSpec]) -> list[str]:
    return [spec.name for spec in specs]
