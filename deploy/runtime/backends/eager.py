"""The module itself in plain PyTorch: what everything else is measured against.

It runs the code of the model's factory, so it is used only when named. An artifact derived from another runs the
module of the export that it descends from, in FP32 or, as `eager:fp16` or `eager:bf16`, in half precision.
"""

import itertools
import statistics
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch._C._autograd import DeviceType

from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError
from deploy.intake.build import rebuild
from deploy.runtime.arrays import writable
from deploy.runtime.profiling import RUNS, WARMUPS, DeviceTimes, LayerTime
from deploy.runtime.session import Session, SessionOptions, closed_error, first_line

GRAPHS = 8
"""CUDA graphs that a session keeps at most, one for each shape of the inputs: those used last."""

_WARMUPS = 3
_REGION = "deploy module "
_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class EagerSession(Session):
    """`inputs` and `outputs` are those of the export, in half precision too. The module is called with its inputs by position.

    On a GPU, FP32 is FP32: torch's settings for TF32 are off while a session is open, unless it is opened with `tf32`.
    """

    backend = "eager"
    native = "torch"
    devices = ("cpu", "cuda")

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        super().__init__(artifact, options, device=_device(options.device))
        self._variant = options.variant
        if "cuda_graph" in options.variant and self.device == "cpu":
            raise BackendError(
                "a CUDA graph needs an NVIDIA GPU that torch can use: leave out cuda_graph, or see `deploy doctor`"
            )
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        root = artifact.root()
        self._describe(root.manifest)
        half = next((_HALVES[name] for name in options.variant if name in _HALVES), None)
        self._half = half
        self._output_dtypes = [getattr(torch, spec.dtype) for spec in self.outputs]
        self._channels_last = "channels_last" in options.variant
        module = rebuild(root).to(self.device, half)
        if self._channels_last:
            module = module.to(memory_format=torch.channels_last)
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        self._plain: torch.nn.Module | None = module
        self._module: Any = self._prepare(module)
        if self.device != "cpu":
            tf32.hold(allow="tf32" in options.variant)

    def _prepare(self, module: torch.nn.Module) -> Any:
        """What is called in the module's stead."""
        if "cuda_graph" in self._variant:
            return CudaGraphs(lambda inputs: flatten(module(*inputs)), torch.device(self.device))
        return module

    def _compute(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        module = self._module
        if module is None:
            raise closed_error(self.name)
        given = [feed[name] for name in self._input_names]
        try:
            with torch.inference_mode():
                inputs = [self._adapt(x) for x in given]
                results = flatten(self._call(module, inputs))
        except BackendError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise BackendError(
                f"{self.backend} failed to run {self.name!r}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if len(results) != len(self._output_names):
            raise BackendError(
                f"{self.name!r} returned {len(results)} tensors; the manifest lists {', '.join(map(str, self.outputs))}"
            )
        if self._half is not None:
            results = [x.to(dtype) for x, dtype in zip(results, self._output_dtypes, strict=True)]
        # The caller may write to what comes back: nothing that is an input, a weight or a buffer is handed out.
        kept = self._memory | {x.untyped_storage().data_ptr() for x in given}
        return [x.clone() if x.untyped_storage().data_ptr() in kept else x for x in results]

    def _adapt(self, x: torch.Tensor) -> torch.Tensor:
        """An input as the module takes it."""
        dtype = self._half if self._half is not None and x.is_floating_point() else x.dtype
        if self._channels_last and x.dim() == 4:
            return x.to(dtype, memory_format=torch.channels_last)
        return x.to(dtype)

    def _call(self, module: Any, inputs: Sequence[torch.Tensor]) -> Any:
        return module(*inputs)

    def layer_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> list[LayerTime]:
        """By torch's profiler: of each module, the time that its own code takes, without that of the modules that it calls."""
        module = self._plain
        if module is None:
            raise closed_error(self.name)
        inputs = [torch.from_numpy(writable(feed[name])).to(self.device) for name in self._input_names]
        with torch.inference_mode():
            return module_times(module, [self._adapt(x) for x in inputs], runs)

    def device_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> DeviceTimes | None:
        if self.device == "cpu":
            return None
        found = []
        for run in range(WARMUPS + runs):
            marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]
            with torch.cuda.device(self.device):
                marks[0].record()
                inputs = {name: torch.from_numpy(writable(x)).to(self.device) for name, x in feed.items()}
                marks[1].record()
                results = self._compute(inputs)
                marks[2].record()
                for result in results:
                    result.cpu()
                marks[3].record()
                torch.cuda.synchronize()
            if run >= WARMUPS:
                found.append([before.elapsed_time(after) for before, after in itertools.pairwise(marks)])
        h2d_ms, gpu_ms, d2h_ms = (statistics.median(part) for part in zip(*found, strict=True))
        return DeviceTimes(gpu_ms=gpu_ms, h2d_ms=h2d_ms, d2h_ms=d2h_ms)

    def _release(self) -> None:
        self._module = self._plain = None
        if self.device != "cpu":
            tf32.release()


def module_times(module: torch.nn.Module, inputs: Sequence[torch.Tensor], runs: int) -> list[LayerTime]:
    """The own time of each module in `module`, on the GPU where `inputs` are there, in the order of the first call."""
    names = {each: name for name, each in module.named_modules()}
    regions: list[Any] = []

    def enter(each: torch.nn.Module, _: Any) -> None:
        regions.append(torch.profiler.record_function(f"{_REGION}{names[each]}"))
        regions[-1].__enter__()

    def leave(_: torch.nn.Module, __: Any, ___: Any) -> None:
        regions.pop().__exit__(None, None, None)

    on_gpu = any(x.is_cuda for x in inputs)
    handles = [each.register_forward_pre_hook(enter) for each in names]
    handles += [each.register_forward_hook(leave) for each in names]
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    try:
        for _ in range(WARMUPS):
            module(*inputs)
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for _ in range(runs):
                module(*inputs)
            if on_gpu:
                torch.cuda.synchronize()
    finally:
        for handle in handles:
            handle.remove()
    series: dict[str, list[float]] = {}
    for event in profile.events():
        if event.name.startswith(_REGION) and event.device_type == DeviceType.CPU:
            took = event.device_time_total if on_gpu else event.cpu_time_total
            series.setdefault(event.name.removeprefix(_REGION), []).append(took / 1e3)
    if any(len(found) % runs for found in series.values()):
        raise BackendError("the module does not call the same modules in every run: its time cannot be told by module")
    whole = {name: statistics.median(np.reshape(found, (runs, -1)).sum(axis=1)) for name, found in series.items()}
    kinds = {name: type(each).__name__ for each, name in names.items()}
    own = dict(whole)
    for name in whole:
        parent = name.rpartition(".")[0]
        while parent not in whole:  # a container that is not called itself, such as a ModuleList
            parent = parent.rpartition(".")[0]
        if name:
            own[parent] -= whole[name]
    return [
        LayerTime(name=name or kinds[name], operator=kinds[name], ms=max(0.0, float(own[name])), modules=(name,))
        for name in whole
    ]


class _Captured:
    """One CUDA graph, and the tensors that it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        self.graph = graph
        self.inputs = inputs
        self.outputs = outputs


class CudaGraphs:
    """A function on lists of CUDA tensors, captured in a CUDA graph for each shape of the inputs.

    Calls may come from many threads and streams; the runs on the GPU follow one another, for they share the graph's
    tensors. Warm-up and capture as in "CUDA Graphs" of torch's notes on CUDA semantics.
    """

    _capturing = threading.Lock()  # of the process: torch captures one graph at a time

    def __init__(self, function: Callable[[list[torch.Tensor]], list[torch.Tensor]], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._captured: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None  # the end of the last run

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """New tensors. Raises BackendError where the function cannot be captured."""
        key = tuple((x.shape, x.stride()) for x in inputs)
        with self._lock, torch.cuda.device(self._device):
            if key not in self._captured:
                self._captured[key] = self._capture(inputs)
            self._captured.move_to_end(key)
            captured = self._captured[key]
            stream = torch.cuda.current_stream(self._device)
            if self._done is not None:
                stream.wait_event(self._done)
            for own, x in zip(captured.inputs, inputs, strict=True):
                own.copy_(x)
                own.record_stream(stream)  # not to be used anew before this run ends, should the session be closed meanwhile
            captured.graph.replay()
            results = [x.clone() for x in captured.outputs]
            self._done = stream.record_event()
            return results

    def _capture(self, inputs: Sequence[torch.Tensor]) -> _Captured:
        if self._done is not None:
            self._done.synchronize()  # a graph is let go of when it has run
        while len(self._captured) >= GRAPHS:
            self._captured.popitem(last=False)
        with self._capturing:
            own = [x.clone() for x in inputs]
            side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                for _ in range(_WARMUPS):
                    self._function(own)
            torch.cuda.current_stream(self._device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on to allocate memory meanwhile.
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    outputs = self._function(own)
            except Exception as error:  # whatever the module does that a graph cannot hold
                raise BackendError(
                    f"the module cannot be captured in a CUDA graph: {type(error).__name__}: {first_line(error)};"
                    " leave out cuda_graph"
                ) from error
        return _Captured(graph, own, outputs)


class _Tf32:
    """torch's permission to compute FP32 in TF32, which is one for the process, held by all sessions that are open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._allow = False
        self._before = (False, False)

    def hold(self, *, allow: bool) -> None:
        """Set the permission until `release`. Raises BackendError when an open session needs it otherwise."""
        with self._lock:
            if self._holders and allow != self._allow:
                words = ("with", "without") if self._allow else ("without", "with")
                raise BackendError(
                    f"another session of this process runs {words[0]} TF32, which is one setting for all:"
                    f" close it before one is opened {words[1]} TF32"
                )
            if not self._holders:
                try:
                    self._before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
                except RuntimeError as error:  # set by the program through fp32_precision
                    raise BackendError(
                        f"torch cannot say whether TF32 is on: {first_line(error)}; set torch.backends.cuda.matmul.allow_tf32"
                        " and torch.backends.cudnn.allow_tf32 in place of fp32_precision"
                    ) from error
                self._set(allow, allow)
            self._allow = allow
            self._holders += 1

    def release(self) -> None:
        """Let go; the last holder puts back what was set before the first."""
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._set(*self._before)

    def _set(self, matmul: bool, cudnn: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = cudnn


tf32 = _Tf32()


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        index = int(device.partition(":")[2] or 0)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise BackendError(
                f"no {device} here: torch {torch.__version__} sees {torch.cuda.device_count()} usable CUDA devices"
            )
    return device


def flatten(value: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in flatten(part)]
    if value is None:
        return []
    raise TypeError(f"the module returned a {type(value).__name__}; expected tensors, or tuples, lists or dicts of them")


def version(variant: Sequence[str]) -> str:
    """The version of torch."""
    return str(torch.__version__)


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return EagerSession(artifact, options)
