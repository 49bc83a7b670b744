"""TensorRT engines, of both flavours. It needs no torch: see `deploy.engine.cuda`."""

import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.engine.attestation import engine_layers
from deploy.engine.callbacks import make_profiler
from deploy.engine.context import EngineContext, Shape, Tensor
from deploy.engine.cuda import Memory, Stream, open_device
from deploy.engine.cuda.arrays import DeviceArray, View, view
from deploy.engine.cuda.driver import has_gpu
from deploy.engine.flavour import load_flavour
from deploy.engine.loaded import LoadedEngine
from deploy.engine.pool import ContextPool
from deploy.engine.profile_choice import ProfileChoice
from deploy.engine.rebuild import engine_plan
from deploy.errors import BackendError, InputError
from deploy.runtime.catalog import refuse_compiled
from deploy.runtime.profiling import RUNS, WARMUPS, DeviceTimes, LayerTime
from deploy.runtime.session import Session, SessionOptions, closed_error

_CONTEXTS = 2  # one is fed while the other computes


class TensorRTSession(Session):
    """An engine on a GPU. At most `concurrency` runs are under way at a time, each in its own execution context.

    Torch tensors on the GPU go in and out without a copy, on the caller's stream: `run` returns before the work is done, as
    torch's functions do. Other arrays on the GPU (`__cuda_array_interface__` or DLPack) go in without a copy, and `DeviceArray`s
    come out once the work is done. Numpy arrays go through pinned memory, on a stream of the context. With the variant
    `cuda_graph`, a shape is replayed as one CUDA graph from its second run on.
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
        plan = engine_plan(artifact, flavour, self._gpu.gpu(), rebuild=options.rebuild)
        self._engine = LoadedEngine(artifact, plan, flavour, self._gpu, graphs="cuda_graph" in options.variant)
        self._dtypes = [np.dtype(spec.dtype) for spec in self.outputs]
        self.concurrency = options.contexts or _CONTEXTS
        self._contexts = ContextPool(self._engine.new_context, self.concurrency, lambda: closed_error(self.name))
        self._choice = ProfileChoice(self.name, self._input_names, self.profiles)
        self._torch_device: Any = None  # torch's name of the GPU, once a tensor has been seen
        self._contexts.give_back(self._contexts.borrow())  # made now, so that an error is raised when the session is opened

    def _check_request(self, artifact: Artifact, options: SessionOptions) -> None:
        manifest = artifact.manifest
        if manifest.kind == "package":
            refuse_compiled(artifact)
        if manifest.kind != "engine" or manifest.target is None:
            raise BackendError(
                f"{artifact.location} is no engine; build one with `deploy build-trt {artifact.location} --flavour {self.backend}`"
            )
        if manifest.target.flavour != self.backend:
            raise BackendError(
                f"{artifact.location} is a {manifest.target.flavour} engine: open it with the backend {manifest.target.flavour}"
            )
        if not has_gpu():
            refuse_compiled(artifact)
        super()._check_request(artifact, options)

    # Feeds.

    def _check(self, feed: Mapping[str, Any]) -> Any:
        sort = super()._check(feed)
        self._profile(feed)
        return sort

    def _shapes(self, feed: Mapping[str, Any]) -> tuple[Shape, ...]:
        return tuple([tuple(feed[name].shape) for name in self._input_names])

    def _profile(self, feed: Mapping[str, Any]) -> int:
        """The index of the profile for a feed. Raises InputError if there is none."""
        return self._choice.index(self._shapes(feed))

    def _compute(self, feed: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        profile = self._profile(feed)
        context = self._contexts.borrow()
        try:
            context.begin(feed, profile)
            return context.finish()
        finally:
            self._contexts.give_back(context)

    def _run_torch(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        here = self._torch_device
        if here is None or any(feed[name].device != here for name in self._input_names):
            if all(x.device.type == "cpu" for x in feed.values()):
                return super()._run_torch(feed)
            here = self._find_torch_device(feed)
        from deploy.engine.cuda import torch_device

        if not isinstance(self._gpu, torch_device.TorchDevice):  # torch was imported after the session was opened
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
            x.record_stream(stream.stream)  # its memory is not reused before the work is done
            inputs.append(Tensor(x.data_ptr(), tuple(x.shape)))
        results = self._run_tensors(inputs, stream)
        return [
            torch_device.as_tensor(memory, shape, dtype) for (memory, shape), dtype in zip(results, self._dtypes, strict=True)
        ]

    def _find_torch_device(self, feed: Mapping[str, Any]) -> Any:
        """torch's name of the session's GPU. Raises InputError for a tensor on another device."""
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
        profile = self._choice.index(shapes)
        context = self._contexts.borrow()
        try:
            return context.run(inputs, shapes, profile, stream)
        finally:
            self._contexts.give_back(context)

    def stream(self, feeds: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """As in `Session`. Numpy feeds overlap: one is copied in while another computes and a third is copied out."""
        running: deque[EngineContext] = deque()

        def finish() -> dict[str, Any]:
            context = running.popleft()
            if not self._contexts.resume(context):
                raise closed_error(self.name)
            try:
                return dict(zip(self._output_names, context.finish(), strict=True))
            finally:
                self._contexts.give_back(context)

        try:
            for feed in feeds:
                if self._closed:
                    raise closed_error(self.name)
                if self._sort(feed) != "numpy":
                    while running:
                        yield finish()
                    yield self.run(feed)
                    continue
                context = self._contexts.borrow_free() if running else self._contexts.borrow()
                if context is None:  # all are in use, some of them here
                    yield finish()
                    context = self._contexts.borrow()
                try:
                    context.begin({name: np.asarray(x, order="C") for name, x in feed.items()}, self._profile(feed))
                except BaseException:
                    self._contexts.give_back(context)
                    raise
                self._contexts.park(context)
                running.append(context)
            while running:
                yield finish()
        finally:
            for context in running:
                if self._contexts.resume(context):  # nobody reads its outputs
                    context.settle()
                    self._contexts.give_back(context)

    def to_device(self, feed: Mapping[str, np.ndarray]) -> dict[str, DeviceArray]:
        """A copy of the feed on the GPU, which `run` takes without a copy; its outputs stay on the GPU too."""
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
        """The inspector's description of the engine, as JSON."""
        return self._engine.information()

    def layer_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> list[LayerTime]:
        """The GPU time of each layer by TensorRT's profiler."""
        profiler = make_profiler(self._trt)
        context = self._contexts.borrow()
        try:
            for run in range(WARMUPS + runs):
                if run == WARMUPS:
                    context.attach(profiler)
                context.begin(feed, self._profile(feed))
                context.finish()
        finally:
            context.attach(None)
            self._contexts.give_back(context)
        layers = {layer.name: layer for layer in engine_layers(self.information())}
        return [
            LayerTime(
                name=name,
                operator=layers[name].kind if name in layers else "",
                ms=statistics.median(times),
                nodes=layers[name].nodes if name in layers else (),
            )
            for name, times in profiler.times.items()
        ]

    def device_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> DeviceTimes | None:
        arrays = {name: np.asarray(x, order="C") for name, x in feed.items()}
        context = self._contexts.borrow()
        try:
            measured = [context.times(arrays, self._profile(arrays)) for _ in range(WARMUPS + runs)][WARMUPS:]
        finally:
            self._contexts.give_back(context)
        times = [run for run in measured if run is not None]
        if not times:
            return None
        h2d_ms, gpu_ms, d2h_ms = (statistics.median(part) for part in zip(*times, strict=True))
        return DeviceTimes(gpu_ms=gpu_ms, h2d_ms=h2d_ms, d2h_ms=d2h_ms)

    def _stop(self) -> None:
        self._contexts.stop()

    def _release(self) -> None:
        self._contexts.close()
        self._engine.close()


def version(variant: Sequence[str]) -> str:
    """The version of TensorRT. Raises BackendError if it is not installed, or there is no GPU."""
    return load_flavour(TensorRTSession.backend).version


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return TensorRTSession(artifact, options)
