"""Plain PyTorch: the module itself, which everything else is measured against.

It runs the code of the model's factory, so it is used only if it is named. A derived artifact runs the module of the export
that it descends from, in FP32 or, as `eager:fp16` or `eager:bf16`, in half precision.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from deploy.artifact.artifact import Artifact
from deploy.engine.cuda.capturing import capturing
from deploy.errors import BackendError
from deploy.intake.build import rebuild
from deploy.runtime.arrays import pinned, to_host, to_torch
from deploy.runtime.cuda_graphs import CudaGraphs
from deploy.runtime.cudnn import FirstRuns, cudnn_benchmark
from deploy.runtime.module_times import module_times
from deploy.runtime.openmp import refuse_lost_threads
from deploy.runtime.profiling import RUNS, WARMUPS, DeviceTimes, LayerTime
from deploy.runtime.runner import closed_error
from deploy.runtime.session import Session, SessionOptions, first_line
from deploy.runtime.tf32 import tf32
from deploy.runtime.torch_device import device_named, wait_for_device
from deploy.runtime.torch_device import version as version
from deploy.words import a_type

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class EagerSession(Session):
    """The rebuilt module. `inputs` and `outputs` are those of the export, in half precision too; inputs are passed by position.

    On a GPU, torch's settings for TF32 are off while a session is open, unless it is opened with `tf32`: FP32 means FP32. And
    cuDNN searches for the fastest convolution of each shape, at the first run of the shape in a thread.
    """

    backend = "eager"
    native = "torch"
    devices = ("cpu", "cuda")

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        super().__init__(artifact, options, device=device_named(options.device))
        self._home = torch.device(self.device)
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
        self._first_runs = FirstRuns()
        self._module: Any = self._prepare(module)
        if self.device != "cpu":
            tf32.hold(allow="tf32" in options.variant)
            cudnn_benchmark.hold()

    def _prepare(self, module: torch.nn.Module) -> Any:
        """The function to call in place of the module."""
        if "cuda_graph" in self._variant:
            return CudaGraphs(lambda inputs: flatten(module(*inputs)), self._home)
        return module

    def _run_torch(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        home, device = self._home, feed[self._input_names[0]].device
        if device != home or len(feed) > 1:
            feed = {name: x if x.device == home else x.to(home) for name, x in feed.items()}
        # A tensor made in inference mode cannot be changed in place outside it; a second tensor on the same memory can. From the
        # tensor itself, from_dlpack takes 20 µs longer, and on a GPU orders streams that are one.
        results = [from_dlpack(to_dlpack(x)) for x in self._compute(feed)]
        return results if device == home else [x.to(device) for x in results]

    def _compute(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        module = self._module
        if module is None:
            raise closed_error(self.name)
        given = [x.detach() if x.requires_grad else x for x in map(feed.__getitem__, self._input_names)]
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
        # The caller may write to the results, so none of them may be an input, a weight or a buffer.
        fed = {x.untyped_storage().data_ptr() for x in given}
        made = [(x, x.untyped_storage().data_ptr()) for x in results]
        return [x.clone() if memory in fed or memory in self._memory else x for x, memory in made]

    def _adapt(self, x: torch.Tensor) -> torch.Tensor:
        """An input in the dtype and memory format of the module."""
        if self._half is None and not self._channels_last:
            return x
        dtype = self._half if self._half is not None and x.is_floating_point() else x.dtype
        if self._channels_last and x.dim() == 4:
            return x.to(dtype, memory_format=torch.channels_last)
        return x.to(dtype)

    def _call(self, module: Any, inputs: Sequence[torch.Tensor]) -> Any:
        if self.device == "cpu" or "cuda_graph" in self._variant:
            return module(*inputs)
        with self._first_runs(inputs):
            return module(*inputs)

    def layer_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> list[LayerTime]:
        """The time of each module by torch's profiler, less that of the modules that it calls."""
        module = self._plain
        if module is None:
            raise closed_error(self.name)
        inputs = [to_torch(feed[name], self.device) for name in self._input_names]
        with self._working(), torch.inference_mode():
            adapted = [self._adapt(x) for x in inputs]
            with capturing:  # the profiler waits for the whole device
                return module_times(module, adapted, runs)

    def device_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> DeviceTimes | None:
        if self.device == "cpu":
            return None
        times = []
        for run in range(WARMUPS + runs):
            marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]
            with torch.cuda.device(self._home):
                staged = {name: pinned(x) for name, x in feed.items()}
                marks[0].record()
                inputs = {name: x.to(self.device, non_blocking=True) for name, x in staged.items()}
                marks[1].record()
                results = self._compute(inputs)
                marks[2].record()
                for result in results:
                    to_host(result)
                marks[3].record()
                wait_for_device(self._home)
            if run >= WARMUPS:
                times.append([before.elapsed_time(after) for before, after in itertools.pairwise(marks)])
        h2d_ms, gpu_ms, d2h_ms = (statistics.median(part) for part in zip(*times, strict=True))
        return DeviceTimes(gpu_ms=gpu_ms, h2d_ms=h2d_ms, d2h_ms=d2h_ms)

    def _revive(self) -> None:
        super()._revive()
        refuse_lost_threads(self.name)

    def _release(self) -> None:
        self._module = self._plain = None
        if self.device != "cpu":
            tf32.release()
            cudnn_benchmark.release()


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
    raise TypeError(f"the module returned {a_type(value)}; expected tensors, or tuples, lists or dicts of them")


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return EagerSession(artifact, options)
