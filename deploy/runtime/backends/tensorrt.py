"""TensorRT engines, of both flavours. Needs no torch: see `deploy.engine.cuda`."""

import statistics
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, RUNTIME_CACHE
from deploy.artifact.tensors import Profile, format_shape
from deploy.engine.attestation import engine_layers
from deploy.engine.context import EngineContext, Shape, Tensor
from deploy.engine.cuda import Device, DeviceMemoryError, Memory, Stream, open_device
from deploy.engine.cuda.arrays import DeviceArray, View, view
from deploy.engine.cuda.driver import has_gpu
from deploy.engine.flavour import load_flavour
from deploy.engine.log import garbage_kept, make_logger
from deploy.engine.rebuild import engine_plan
from deploy.errors import BackendError, InputError
from deploy.host.cache import keep
from deploy.runtime.catalog import refuse_engine
from deploy.runtime.profiling import RUNS, WARMUPS, DeviceTimes, LayerTime
from deploy.runtime.session import Session, SessionOptions, closed_error

if TYPE_CHECKING:
    import tensorrt


_KNOWN_SHAPES = 4096
_CONTEXTS = 2  # one is fed while the other computes


class TensorRTSession(Session):
    """An engine. `concurrency` runs are under way at a time, each in an execution context of its own.

    Torch tensors on the GPU go in and out as they are, on the caller's stream: `run` returns before the work is done, as
    torch's own functions do. Other arrays on the GPU (`__cuda_array_interface__` or DLPack) go in as they are, and
    `DeviceArray`s come out, when the work is done. Numpy arrays go through pinned memory, on a stream of the session's own.
    Variant `cuda_graph`: replayed as one CUDA graph from the second run of a shape on.
    """

    backend = "tensorrt"
    devices = ("cuda",)
    device_arrays = True

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        index = int(options.device.partition(":")[2] or 0)
        super().__init__(artifact, options, device=f"cuda:{index}")
        flavour = load_flavour(self.backend)
        self._gpu = open_device(index)
        self._trt = flavour.trt
        self._log = make_logger(flavour.trt)
        self._graphs = "cuda_graph" in options.variant
        plan = engine_plan(artifact, flavour, self._gpu.gpu(), rebuild=options.rebuild)
        with self._gpu.active():
            with garbage_kept():
                self._runtime = self._trt.Runtime(self._log)
            engine: tensorrt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{flavour.name} {flavour.version} cannot load {artifact.location}: {self._log.last()}")
        self._engine = engine
        self._released = False
        self._check_tensors(artifact)
        self._dtypes = [np.dtype(spec.dtype) for spec in self.outputs]
        self._config, self._cache = self._runtime_config(artifact)
        self._cache_file = artifact.path / RUNTIME_CACHE
        self.concurrency = options.contexts or _CONTEXTS
        self._contexts: list[EngineContext] = []
        self._idle: list[EngineContext] = []
        self._free = threading.Condition()
        self._waiting = 0
        self._known_profiles: dict[tuple[Shape, ...], int] = {}
        self._torch_device: Any = None  # torch's name of the GPU, once a tensor was seen
        self._give_back(self._claim())  # the first is made now: what fails, fails when the session is opened

    def _check_request(self, artifact: Artifact, options: SessionOptions) -> None:
        manifest = artifact.manifest
        if manifest.kind != "engine" or manifest.target is None:
            raise BackendError(
                f"{artifact.location} is no engine; build one with `deploy build-trt {artifact.location} --flavour {self.backend}`"
            )
        if manifest.target.flavour != self.backend:
            raise BackendError(
                f"{artifact.location} is a {manifest.target.flavour} engine: open it with the backend {manifest.target.flavour}"
            )
        if not has_gpu():
            refuse_engine(artifact)
        super()._check_request(artifact, options)

    def _check_tensors(self, artifact: Artifact) -> None:
        """The engine must have the inputs and outputs of the manifest, all of them in device memory."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if sorted(inputs) != sorted(self._input_names) or sorted(outputs) != sorted(self._output_names):
            raise BackendError(
                f"{artifact.path / ENGINE} has inputs {', '.join(inputs)} and outputs {', '.join(outputs)}; the manifest lists"
                f" {', '.join(self._input_names)} and {', '.join(self._output_names)}"
            )
        if host := [name for name in names if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE]:
            raise BackendError(f"{host[0]!r} of {self.name!r} is a shape that the engine wants in host memory: not supported")

    def _runtime_config(self, artifact: Artifact) -> tuple[Any, Any]:
        """Of tensorrt-rtx: settings of contexts, and what was compiled for this machine in earlier runs."""
        if self.backend != "tensorrt-rtx":
            return None, None
        trt: Any = self._trt  # what follows is its own
        config: Any = self._engine.create_runtime_config()
        cache = config.create_runtime_cache()
        file = artifact.path / RUNTIME_CACHE
        if file.is_file():
            cache.deserialize(file.read_bytes())  # False where it does not fit: it is made anew then
        config.set_runtime_cache(cache)
        if self._graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config, cache  # the config does not hold the cache: dropped, the process would crash

    # Contexts.

    def _acquire(self, *, wait: bool = True) -> EngineContext | None:
        """A context that nobody uses; a new one while there are fewer than `concurrency`; else the next that is given
        back, or without `wait` None."""
        try:
            return self._idle.pop()  # atomic, and mostly all that there is to it
        except IndexError:
            pass
        with self._free:
            self._waiting += 1  # from now on whoever gives one back takes the lock: this is not missed
            try:
                while not self._idle:
                    if self._released:
                        raise closed_error(self.name)
                    if len(self._contexts) < self.concurrency:
                        context = self._new_context()
                        self._contexts.append(context)
                        return context
                    if not wait:
                        return None
                    self._free.wait()
                return self._idle.pop()
            finally:
                self._waiting -= 1

    def _claim(self) -> EngineContext:
        context = self._acquire()
        assert context is not None
        return context

    def _give_back(self, context: EngineContext) -> None:
        self._idle.append(context)
        if self._waiting:
            with self._free:
                self._free.notify()

    def _new_context(self) -> EngineContext:
        engine = self._engine
        arguments = () if self._config is None else (self._config,)
        with self._gpu.active():
            context: tensorrt.IExecutionContext | None = engine.create_execution_context(*arguments)
        if context is None:
            needed, (free, total) = engine.device_memory_size_v2, self._gpu.memory()
            if needed > free:
                raise DeviceMemoryError(needed, free, total)
            raise BackendError(f"no execution context for {self.name!r}: {self._log.last()}")
        return EngineContext(
            context,
            self._gpu,
            self.inputs,
            self.outputs,
            graphs=self._graphs and self._config is None,
            allocator=self._allocator,
        )

    def _allocator(self, device: Device) -> Any:
        class Allocator(self._trt.IOutputAllocator):  # type: ignore[misc,name-defined]
            """Memory for one output, whose size the engine knows in mid-run."""

            def __init__(self) -> None:
                super().__init__()
                self._memory: Memory | None = None
                self._shape: Shape = ()

            def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
                if self._memory is None or self._memory.nbytes < size:
                    try:
                        self._memory = device.allocate(size)
                    except BackendError:
                        return 0  # an exception would not come through: the run fails
                return self._memory.pointer

            def notify_shape(self, name: str, shape: Sequence[int]) -> None:
                self._shape = tuple(shape)

            def take(self) -> tuple[Memory, Shape]:
                """The output; the next one has other memory."""
                memory, self._memory = self._memory, None
                assert memory is not None
                return memory, self._shape

        return Allocator()

    # Feeds.

    def _check(self, feed: Mapping[str, Any]) -> Any:
        sort = super()._check(feed)
        self._profile(self._shapes(feed))
        return sort

    def _shapes(self, feed: Mapping[str, Any]) -> tuple[Shape, ...]:
        return tuple([tuple(feed[name].shape) for name in self._input_names])

    def _profile(self, shapes: tuple[Shape, ...]) -> int:
        """The profile that holds these shapes, of several the one whose optimum is nearest. Raises InputError."""
        index = self._known_profiles.get(shapes)
        if index is None:
            index = self._find_profile(dict(zip(self._input_names, shapes, strict=True)))
            if len(self._known_profiles) >= _KNOWN_SHAPES:
                self._known_profiles.clear()
            self._known_profiles[shapes] = index
        return index

    def _find_profile(self, shapes: Mapping[str, Shape]) -> int:
        found = [index for index, profile in enumerate(self.profiles) if _holds(profile, shapes)]
        if not found:
            if not self.profiles:
                return 0
            given = ", ".join(f"{name} {format_shape(shape)}" for name, shape in shapes.items())
            ranges = " or ".join(", ".join(f"{n}={r}" for n, r in profile.items()) for profile in self.profiles)
            raise InputError(
                f"{given} is outside every profile of {self.name!r}: expected {ranges}; build with --shapes for more"
            )
        return min(found, key=lambda index: _distance(self.profiles[index], shapes))

    def _compute(self, feed: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        profile = self._profile(self._shapes(feed))
        context = self._claim()
        try:
            context.begin(feed, profile)
            return context.finish()
        finally:
            self._give_back(context)

    def _run_torch(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        here = self._torch_device
        if here is None or any(feed[name].device != here for name in self._input_names):
            if all(x.device.type == "cpu" for x in feed.values()):
                return super()._run_torch(feed)
            here = self._find_torch_device(feed)
        from deploy.engine.cuda import torch_device

        if not isinstance(self._gpu, torch_device.TorchDevice):  # it was imported after the session was opened
            views = {name: view(name, x.detach().contiguous()) for name, x in feed.items()}
            return [torch_device.adopt(array) for array in self._run_views(views)]
        stream = self._gpu.current()
        inputs = []
        kept = []
        for name in self._input_names:
            x = feed[name]
            if x.requires_grad:
                x = x.detach()
            if not x.is_contiguous():
                x = x.contiguous()
                kept.append(x)
            x.record_stream(stream.stream)  # its memory is not used again before the work is done
            inputs.append(Tensor(x.data_ptr(), tuple(x.shape)))
        results = self._run_tensors(inputs, stream)
        return [
            torch_device.as_tensor(memory, shape, dtype) for (memory, shape), dtype in zip(results, self._dtypes, strict=True)
        ]

    def _find_torch_device(self, feed: Mapping[str, Any]) -> Any:
        """torch's name of the GPU of the session. Raises InputError for a tensor that is elsewhere."""
        for name, x in feed.items():
            if str(x.device) != self.device:
                raise InputError(f"{name!r} is on {x.device}; this session is on {self.device}: move it, or open one there")
        self._torch_device = next(iter(feed.values())).device
        return self._torch_device

    def _run_device(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        return self._run_views({name: view(name, x) for name, x in feed.items()})

    def _run_views(self, views: Mapping[str, View]) -> list[DeviceArray]:
        for name, x in views.items():
            if x.index is not None and x.index != self._gpu.index:
                raise InputError(f"{name!r} is on cuda:{x.index}; this session is on {self.device}")
        stream = self._gpu.stream()
        for x in views.values():
            if x.stream is not None:
                self._gpu.wait_for(x.stream, stream)
        results = self._run_tensors([Tensor(views[name].pointer, views[name].shape) for name in self._input_names], stream)
        stream.synchronize()
        return [
            DeviceArray(memory, shape, dtype, self._gpu, stream)
            for (memory, shape), dtype in zip(results, self._dtypes, strict=True)
        ]

    def _run_tensors(self, inputs: Sequence[Tensor], stream: Stream) -> list[tuple[Memory, Shape]]:
        shapes = tuple([tensor.shape for tensor in inputs])
        profile = self._profile(shapes)
        context = self._claim()
        try:
            return context.run(inputs, shapes, profile, stream)
        finally:
            self._give_back(context)

    def stream(self, feeds: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """As of every session. Numpy feeds overlap: one is copied in while another computes and a third is copied out."""
        running: deque[EngineContext] = deque()

        def finish() -> dict[str, Any]:
            context = running.popleft()
            try:
                return dict(zip(self._output_names, context.finish(), strict=True))
            finally:
                self._give_back(context)

        try:
            for feed in feeds:
                if self._closed:
                    raise closed_error(self.name)
                if self._check(feed) != "numpy":
                    while running:
                        yield finish()
                    yield self.run(feed)
                    continue
                context = self._acquire(wait=not running)
                if context is None:  # all are in use, some of them here
                    yield finish()
                    context = self._claim()
                try:
                    profile = self._profile(self._shapes(feed))
                    context.begin({name: np.asarray(x, order="C") for name, x in feed.items()}, profile)
                except BaseException:
                    self._give_back(context)
                    raise
                running.append(context)
            while running:
                yield finish()
        finally:
            while running:
                finish()

    def to_device(self, feed: Mapping[str, np.ndarray]) -> dict[str, DeviceArray]:
        """The arrays copied to the GPU: a feed that `run` takes as it is, and whose outputs stay there too."""
        stream = self._gpu.stream()
        copies = {}
        for name, array in feed.items():
            memory, host = self._gpu.allocate(array.nbytes), self._gpu.pinned(array.nbytes)
            host[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            memory.write(host, stream)
            stream.synchronize()
            copies[name] = DeviceArray(memory, array.shape, array.dtype, self._gpu, stream)
        return copies

    def information(self) -> str:
        """What the inspector tells of the engine, as JSON."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def layer_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> list[LayerTime]:
        """GPU time, as TensorRT's profiler tells it."""
        profiler = self._profiler()
        context = self._claim()
        try:
            for run in range(WARMUPS + runs):
                if run == WARMUPS:
                    context.attach(profiler)
                context.begin(feed, self._profile(self._shapes(feed)))
                context.finish()
        finally:
            context.attach(None)
            self._give_back(context)
        told = {layer.name: layer for layer in engine_layers(self.information())}
        return [
            LayerTime(
                name=name,
                operator=told[name].kind if name in told else "",
                ms=statistics.median(times),
                nodes=told[name].nodes if name in told else (),
            )
            for name, times in profiler.times.items()
        ]

    def device_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> DeviceTimes | None:
        arrays = {name: np.asarray(x, order="C") for name, x in feed.items()}
        context = self._claim()
        try:
            found = [context.times(arrays, self._profile(self._shapes(arrays))) for _ in range(WARMUPS + runs)][WARMUPS:]
        finally:
            self._give_back(context)
        times = [each for each in found if each is not None]
        if not times:
            return None
        h2d_ms, gpu_ms, d2h_ms = (statistics.median(part) for part in zip(*times, strict=True))
        return DeviceTimes(gpu_ms=gpu_ms, h2d_ms=h2d_ms, d2h_ms=d2h_ms)

    def _profiler(self) -> Any:
        class Profiler(self._trt.IProfiler):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.times: dict[str, list[float]] = {}

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.times.setdefault(layer_name, []).append(ms)

        return Profiler()

    def _release(self) -> None:
        with self._free:
            self._released = True
            self._waiting += 1
            left = len(self._contexts)
            while left:
                try:
                    context = self._idle.pop()  # which nobody else can take then
                except IndexError:
                    self._free.wait()
                    continue
                context.close()
                left -= 1
            self._contexts.clear()
            if self._cache is not None:
                keep(self._cache_file, bytes(self._cache.serialize()), "what tensorrt-rtx compiled")
            del self._config, self._cache, self._engine, self._runtime
            self._free.notify_all()


def _holds(profile: Profile, shapes: Mapping[str, Shape]) -> bool:
    return all(
        len(shapes[name]) == len(sides.min)
        and all(low <= size <= high for low, size, high in zip(sides.min, shapes[name], sides.max, strict=True))
        for name, sides in profile.items()
    )


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> int:
    return sum(abs(a - b) for name, sides in profile.items() for a, b in zip(sides.opt, shapes[name], strict=True))


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return TensorRTSession(artifact, options)
