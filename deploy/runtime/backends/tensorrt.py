"""TensorRT engines, of both flavours. It needs no torch: see `deploy.engine.cuda`."""

import statistics
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import random_feed
from deploy.engine.callbacks import make_profiler
from deploy.engine.context import EngineContext, Shape
from deploy.engine.cuda import open_device
from deploy.engine.cuda.arrays import DeviceArray, copied
from deploy.engine.cuda.driver import has_gpu
from deploy.engine.cuda.nvtx import annotations
from deploy.engine.flavour import load_flavour
from deploy.engine.layers import engine_layers
from deploy.engine.loaded import ExecutionOptions, LoadedEngine
from deploy.engine.pool import ContextPool
from deploy.engine.profile_choice import ProfileChoice
from deploy.engine.rebuild import engine_plan
from deploy.errors import BackendError
from deploy.runtime.arrays import Sort, write
from deploy.runtime.catalog import refuse_compiled
from deploy.runtime.device_calls import ArrayCalls, TorchCalls
from deploy.runtime.profiling import RUNS, WARMUPS, DeviceTimes, LayerTime
from deploy.runtime.runner import closed_error
from deploy.runtime.session import Session, SessionOptions, first_line

_CONTEXTS = 2  # one is fed while the other computes


class TensorRTSession(Session):
    """An engine on a GPU. At most `concurrency` runs are under way at a time, each in its own execution context and stream.

    Torch tensors on the GPU go in and out without a copy, in the order of the caller's stream: `run` returns before the work is
    done, as torch's functions do. Other arrays on the GPU (`__cuda_array_interface__` or DLPack) go in without a copy, and
    `DeviceArray`s come out once the work is done. Arrays on the GPU in `out` are written to by the engine itself. Numpy arrays go
    through pinned memory. An input on whose values shapes depend is read on the host: give it as a numpy array or a torch tensor.

    Variants: `cuda_graph` replays runs as one CUDA graph from the second in a row with the same shapes on; `nvtx` makes ranges for
    Nsight Systems; of tensorrt-rtx, `eager_kernels` compiles kernels for new shapes before their first run, `general_kernels` never.
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
        self._engine = LoadedEngine(artifact, plan, flavour, self._gpu, _execution(options.variant))
        self._host_inputs = self._engine.host_inputs
        self._graphs = "cuda_graph" in options.variant
        self.concurrency = options.contexts or _CONTEXTS
        name = self.name  # and not the session, which would hold itself
        self._contexts = ContextPool(self._engine.new_context, self.concurrency, lambda: closed_error(name))
        self._choice = ProfileChoice(self.name, self._input_names, self.profiles)
        self._bfloat16 = any(spec.dtype == "bfloat16" for spec in (*self.inputs, *self.outputs))
        self._first_input = min(self._input_names, key=self._host_inputs.__contains__)  # on the GPU, if one is
        self._array_calls = ArrayCalls(self._gpu, self.inputs, self.outputs, self._host_inputs)
        self._torch_calls: TorchCalls | None = None  # once a tensor has been seen
        self._warming = threading.Lock()
        self._abandoned = weakref.finalize(self, _abandon, self._contexts, self._engine)
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

    def _borrow(self, feed: Mapping[str, Any]) -> EngineContext:
        return self._contexts.borrow(self._shapes(feed) if self._graphs else None)

    def _compute(self, feed: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        profile = self._profile(feed)
        context = self._borrow(feed)
        try:
            context.begin(feed, profile)
            return context.finish()
        finally:
            self._contexts.give_back(context)

    # Arrays on the GPU.

    def _run_torch(self, feed: Mapping[str, Any], out: Mapping[str, Any] | None = None) -> Sequence[Any]:
        if self._host_inputs:
            torch = sys.modules["torch"]
            feed = {name: torch.as_tensor(x, device="cpu") if name in self._host_inputs else x for name, x in feed.items()}
        calls = self._torch_calls or self._make_torch_calls()
        if feed[self._first_input].is_cuda:
            return self._run_call(calls, feed, out)
        for name, x in feed.items():
            if x.device.type != "cpu":
                raise calls.elsewhere(name, x)
        if not self._bfloat16:
            return super()._run_torch(feed)
        there = {name: x if name in self._host_inputs else x.to(self.device) for name, x in feed.items()}
        return [y.cpu() for y in self._run_call(calls, there, None)]

    def _make_torch_calls(self) -> TorchCalls:
        self._torch_calls = TorchCalls(self._gpu, self.inputs, self.outputs, self._host_inputs)
        return self._torch_calls

    def _run_device(self, feed: Mapping[str, Any], out: Mapping[str, Any] | None = None) -> Sequence[Any]:
        return self._run_call(self._array_calls, feed, out, wait=True)

    def _run_into(self, feed: Mapping[str, Any], sort: Sort, out: Mapping[str, Any]) -> dict[str, Any]:
        """Run on arrays on the GPU; those of `out` are written to by the engine itself."""
        if sort == "device":
            self._array_calls.check_out(out)
            results = self._run_device(feed, out)
        elif any(x.is_cuda for name, x in feed.items() if name not in self._host_inputs):
            (self._torch_calls or self._make_torch_calls()).check_out(out)
            results = self._run_torch(feed, out)
        else:
            return write(dict(zip(self._output_names, self._run_torch(feed), strict=True)), out)
        return {**dict(zip(self._output_names, results, strict=True)), **out}

    def _run_call(
        self,
        calls: TorchCalls | ArrayCalls,
        feed: Mapping[str, Any],
        out: Mapping[str, Any] | None,
        *,
        wait: bool = False,
    ) -> list[Any]:
        context = self._borrow(feed)
        try:
            call = calls.call(feed, out)
            profile = self._choice.index(call.shapes)
            values = {name: np.asarray(feed[name], order="C") for name in self._host_inputs}
            return context.run(call.inputs, call.shapes, profile, call.callers, call.place, values, wait)
        except RuntimeError as error:  # torch's
            context.recover(error)
            raise BackendError(f"torch failed on {self.device}: {first_line(error)}") from error
        except BackendError as error:
            context.recover(error)
            raise
        finally:
            self._contexts.give_back(context)

    # Many runs.

    def stream(self, feeds: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """As in `Session`. Numpy feeds overlap: one is copied in while another computes and a third is copied out."""
        running: deque[EngineContext] = deque()

        def finish() -> dict[str, Any]:
            context = running.popleft()
            with self._working():
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
                with self._working():
                    context = self._contexts.borrow_free() if running else self._contexts.borrow()
                    if context is not None:
                        self._begin(context, feed)
                if context is None:  # all are in use, some of them here
                    yield finish()
                    with self._working():
                        context = self._contexts.borrow()
                        self._begin(context, feed)
                running.append(context)
            while running:
                yield finish()
        finally:
            for context in running if not self._stale else ():
                if self._contexts.resume(context):  # nobody reads its outputs
                    context.settle()
                    self._contexts.give_back(context)

    def _begin(self, context: EngineContext, feed: Mapping[str, Any]) -> None:
        """Begin a run in a borrowed context, and park it."""
        try:
            context.begin({name: np.asarray(x, order="C") for name, x in feed.items()}, self._profile(feed))
        except BaseException:
            self._contexts.give_back(context)
            raise
        self._contexts.park(context)

    def warmup(self, feed: Mapping[str, Any] | None = None, runs: int = 3) -> None:
        """As in `Session`, in each execution context: all of them are made now.

        Raises DeviceMemoryError if there is no room for them.
        """
        feed = self._example() if feed is None else feed
        with self._working(), self._warming:
            self._contexts.fill()
            held = []
            while (context := self._contexts.borrow_free()) is not None:
                held.append(context)
            warm = []
            try:
                for _ in range(max(len(held), 1)):
                    if held:
                        self._contexts.give_back(held.pop())  # the next to be borrowed
                    super().warmup(feed, runs)
                    if held and (context := self._contexts.borrow_free()) is not None:
                        warm.append(context)
            finally:
                for context in (*held, *warm):
                    self._contexts.give_back(context)
            self._engine.save()

    def _example(self) -> dict[str, Any]:
        """Random arrays of the optimal shapes; torch tensors where numpy lacks a dtype."""
        arrays: dict[str, Any] = dict(random_feed(self.inputs, self.dims()))
        if not self._bfloat16:
            return arrays
        import torch

        return {spec.name: torch.from_numpy(arrays[spec.name]).to(getattr(torch, spec.dtype)) for spec in self.inputs}

    def to_device(self, feed: Mapping[str, np.ndarray]) -> dict[str, DeviceArray]:
        """A copy of the feed on the GPU, which `run` takes without a copy; its outputs stay on the GPU too."""
        with self._working():
            return {name: copied(array, self._gpu) for name, array in feed.items()}

    # What is inside.

    def information(self) -> str:
        """The inspector's description of the engine, as JSON."""
        with self._working():
            return self._engine.information()

    def layer_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> list[LayerTime]:
        """The GPU time of each layer by TensorRT's profiler."""
        profiler = make_profiler(self._trt)
        with self._working():
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
        with self._working():
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

    def _forked(self) -> None:
        self._abandoned.detach()
        super()._forked()

    def _stop(self) -> None:
        self._contexts.stop()

    def _release(self) -> None:
        self._abandoned.detach()
        try:
            self._contexts.close()
        finally:
            self._engine.close()


def _execution(variant: Sequence[str]) -> ExecutionOptions:
    kernels: Literal["lazy", "eager", "none"] = "lazy"
    if "eager_kernels" in variant:
        kernels = "eager"
    elif "general_kernels" in variant:
        kernels = "none"
    return ExecutionOptions(
        graphs="cuda_graph" in variant, kernels=kernels, annotate=annotations() if "nvtx" in variant else None
    )


def _abandon(contexts: ContextPool, engine: LoadedEngine) -> None:
    """Release, in the right order, what a session holds that nobody closed: when it is collected, or the process ends."""
    contexts.stop()
    contexts.close(wait=False)
    if not contexts.made:
        engine.close()


def version(variant: Sequence[str]) -> str:
    """The version of TensorRT. Raises BackendError if it is not installed, or there is no GPU."""
    return load_flavour(TensorRTSession.backend).version


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return TensorRTSession(artifact, options)
