"""An engine in the memory of a GPU, from which execution contexts are made."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


class LoadedEngine:
    """An ICudaEngine of either flavour, with the TensorRT objects that must live as long as it does.

    plan: the bytes of the engine file. graphs: let contexts replay their runs as CUDA graphs. Raises BackendError if TensorRT
    cannot load the plan, or if its inputs and outputs are not those of the artifact's manifest.
    """

    def __init__(self, artifact: Artifact, plan: bytes, flavour: Flavour, gpu: Device, *, graphs: bool) -> None:
        self._trt = flavour.trt
        self._gpu = gpu
        self._name = artifact.manifest.name
        self._graphs = graphs
        self._inputs = tuple(artifact.manifest.inputs)
        self._outputs = tuple(artifact.manifest.outputs)
        self._log = make_logger(flavour.trt)
        with gpu.active():
            self._runtime = start(self._trt.Runtime, self._log, f"{flavour.name} {flavour.version}")
            if artifact.manifest.target is not None and artifact.manifest.target.version_compatible:
                self._runtime.engine_host_code_allowed = True  # it holds its own runtime, which TensorRT else refuses to load
            engine: tensorrt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{flavour.name} {flavour.version} cannot load {artifact.location}: {self._log.last()}")
        self._engine = engine
        self._check_tensors(artifact.path / ENGINE)
        if artifact.manifest.target is not None and artifact.manifest.target.stripped:
            with gpu.active():
                refit(engine, self._trt, artifact.onnx_path, self._log, str(artifact.location))
        self._cache_file = artifact.path / RUNTIME_CACHE
        self._config: Any = None
        self._cache: Any = None  # the config does not hold the cache: if it were dropped, the process would crash
        if flavour.name == "tensorrt-rtx":
            self._configure_rtx()

    def _check_tensors(self, file: Path) -> None:
        """The engine must have the inputs and outputs of the manifest, all of them in device memory."""
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
        if host := [name for name in names if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE]:
            raise BackendError(f"{host[0]!r} of {self._name!r} is a shape that the engine wants in host memory: not supported")

    def _configure_rtx(self) -> None:
        """For tensorrt-rtx: the settings of contexts, and what was compiled for this machine in earlier runs."""
        trt: Any = self._trt  # tensorrt-rtx has names that tensorrt lacks
        engine: Any = self._engine
        config = engine.create_runtime_config()
        self._config, self._cache = config, config.create_runtime_cache()
        if self._cache_file.is_file():
            self._cache.deserialize(self._cache_file.read_bytes())  # False if it does not fit: it is then made anew
        config.set_runtime_cache(self._cache)
        if self._graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE

    def new_context(self) -> EngineContext:
        """A new execution context. Raises DeviceMemoryError if the GPU has no room for it, BackendError if it fails otherwise."""
        engine = self._engine
        arguments = () if self._config is None else (self._config,)
        with self._gpu.active():
            context: tensorrt.IExecutionContext | None = engine.create_execution_context(*arguments)
        if context is None:
            needed, (free, total) = engine.device_memory_size_v2, self._gpu.memory()
            if needed > free:
                raise DeviceMemoryError(needed, free, total)
            raise BackendError(f"no execution context for {self._name!r}: {self._log.last()}")
        return EngineContext(
            context,
            self._gpu,
            self._inputs,
            self._outputs,
            graphs=self._graphs and self._config is None,
            allocator=lambda device: make_allocator(self._trt, device),
        )

    def information(self) -> str:
        """The inspector's description of the engine at the optimal shapes of its first profile, as JSON."""
        arguments = () if self._config is None else (self._config,)
        with self._gpu.active():
            context: tensorrt.IExecutionContext | None = self._engine.create_execution_context(*arguments)
            return describe(self._engine, context, self._trt, _names(self._inputs))

    def close(self) -> None:
        """Let go of the engine, after its contexts; keep what tensorrt-rtx compiled for the next time."""
        if self._cache is not None:
            keep(self._cache_file, bytes(self._cache.serialize()), "what tensorrt-rtx compiled")
        del self._config, self._cache, self._engine, self._runtime


def _names(specs: Sequence[TensorSpec]) -> list[str]:
    return [spec.name for spec in specs]
