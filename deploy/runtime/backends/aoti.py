"""AOTInductor: the module compiled ahead of time by torch, in a package of its own (`deploy build-aoti`). It runs without the module's code."""

import itertools
import queue
import statistics
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deploy.artifact.artifact import Artifact
from deploy.engine.profile_choice import ProfileChoice
from deploy.errors import BackendError
from deploy.runtime.arrays import Sort, pinned, to_host, writable
from deploy.runtime.catalog import refuse_compiled
from deploy.runtime.cuda_graphs import CudaGraphs
from deploy.runtime.cudnn import FirstRuns, cudnn_benchmark
from deploy.runtime.openmp import refuse_lost_threads
from deploy.runtime.package import package_file
from deploy.runtime.profiling import RUNS, WARMUPS, DeviceTimes
from deploy.runtime.runner import closed_error
from deploy.runtime.session import Session, SessionOptions, first_line
from deploy.runtime.tf32 import tf32
from deploy.runtime.torch_device import device_named, wait_for_device
from deploy.runtime.torch_device import version as version

_STREAMS = 2
"""By default one numpy feed computes on a GPU while another is copied."""


class AotiSession(Session):
    """A package on the device that it was compiled for.

    Torch tensors on the device are taken without a copy, on the caller's current stream, and the results are new tensors there. A
    numpy feed goes to a GPU through pinned memory, on one of `contexts` streams of the session's own. One run at a time is begun;
    on a GPU the next may begin before it ends. On the CPU a run holds Python's lock until it ends, as torch's runner does.
    """

    backend = "aoti"
    native = "torch"
    devices = ("cpu", "cuda")

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        super().__init__(artifact, options)
        target = artifact.manifest.package
        assert target is not None  # or the request was refused
        asked = options.device if options.device != "auto" else target.device
        self.device = device_named(asked)
        self._home = torch.device(self.device)
        self._on_gpu = self._home.type == "cuda"
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._choice = ProfileChoice(self.name, self._input_names, self.profiles, command="build-aoti")
        file = package_file(artifact, self.device, rebuild=options.rebuild)
        index = self._home.index if self._on_gpu else -1
        try:
            # What `torch._inductor.aoti_load_package` makes, without the compiler, which takes seconds to import. One run at a time is
            # begun: with `run_single_threaded` it need not wait for the end of the last one on the GPU.
            self._loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", True, 1, index)
        except Exception as error:  # torch's loader and the system's raise of every kind
            raise BackendError(f"torch {torch.__version__} cannot load {file}: {first_line(error)}") from error
        self._lock = threading.Lock()
        self._passed: list[int] | None = None  # the outputs that are an input, which the caller may not get to write to
        self._launch: Any = self._loader.boxed_run
        self._holds_tf32 = False
        if self._on_gpu:
            self._prepare_gpu(artifact, options)

    def _prepare_gpu(self, artifact: Artifact, options: SessionOptions) -> None:
        self.concurrency = options.contexts or _STREAMS
        self._streams: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
        for _ in range(self.concurrency):
            self._streams.put(torch.cuda.Stream(self._home))  # type: ignore[no-untyped-call]
        launch, first_runs = self._launch, FirstRuns()

        def apart(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            with first_runs(inputs):
                results: list[torch.Tensor] = launch(inputs)
            return results

        self._launch = apart
        if "cuda_graph" in options.variant:
            graphs = CudaGraphs(lambda inputs: launch(list(inputs)), self._home)
            self._launch = lambda inputs: graphs(*inputs)
        if artifact.manifest.precision == "fp32":
            tf32.hold(allow=False)
            self._holds_tf32 = True
        cudnn_benchmark.hold()
        wait_for_device(self._home)  # the weights are there, whichever stream reads them

    def _check_request(self, artifact: Artifact, options: SessionOptions) -> None:
        target = artifact.manifest.package
        if artifact.manifest.kind == "engine":
            refuse_compiled(artifact)
        if target is None:
            raise BackendError(
                f"{artifact.location} is no AOTInductor package; build one with `deploy build-aoti {artifact.location}`"
            )
        if options.device.partition(":")[0] not in ("auto", target.device):
            raise BackendError(
                f"{artifact.location} was compiled for {target.device}, not for {options.device}: build one with"
                f" `deploy build-aoti --device {options.device}`"
            )
        if "cuda_graph" in options.variant and target.device == "cpu":
            raise BackendError(f"{artifact.location} was compiled for the CPU, which has no CUDA graphs: leave out cuda_graph")
        super()._check_request(artifact, options)

    def _check(self, feed: Mapping[str, Any]) -> Sort:
        sort = super()._check(feed)
        self._choice.index(tuple(tuple(feed[name].shape) for name in self._input_names))
        return sort

    def _compute(self, feed: Mapping[str, Any]) -> list[torch.Tensor]:
        """Run on the device and the current stream; the results are tensors of their own there."""
        given = []
        for name in self._input_names:
            x = feed[name]
            if x.device != self._home:
                x = x.to(self._home)
            if x.requires_grad:
                x = x.detach()
            given.append(x if x.is_contiguous() else x.contiguous())
        if self._on_gpu:
            with torch.cuda.device(self._home):
                return self._run(given)
        torch.get_num_threads()  # gives a thread that torch has not seen yet the number of threads that was set
        return self._run(given)

    def _run(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        launch = self._launch
        if launch is None:
            raise closed_error(self.name)
        try:
            with self._lock:
                results: list[torch.Tensor] = launch(given.copy())  # the runner empties the list
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(
                f"{self.backend} failed to run {self.name!r}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if self._passed is None:
            memory = {x.untyped_storage().data_ptr() for x in given}
            self._passed = [index for index, x in enumerate(results) if x.untyped_storage().data_ptr() in memory]
        for index in self._passed:
            results[index] = results[index].clone()
        return results

    def _run_torch(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        results = self._compute(feed)
        device = feed[self._input_names[0]].device
        return results if device == self._home else [x.to(device) for x in results]

    def _run_numpy_on_torch(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        if not self._on_gpu:
            return [x.numpy() for x in self._compute({name: torch.from_numpy(writable(x)) for name, x in feed.items()})]
        stream = self._streams.get()
        try:
            with torch.cuda.stream(stream):
                on_gpu = {name: pinned(x).to(self._home, non_blocking=True) for name, x in feed.items()}
                hosts = [to_host(x) for x in self._compute(on_gpu)]
                stream.synchronize()
            return [host.numpy().copy() for host in hosts]  # pinned memory is scarce: it is not the caller's to keep
        finally:
            self._streams.put(stream)

    def device_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> DeviceTimes | None:
        if not self._on_gpu:
            return None
        times = []
        stream = self._streams.get()
        try:
            for run in range(WARMUPS + runs):
                marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]
                with torch.cuda.stream(stream):
                    staged = {name: pinned(x) for name, x in feed.items()}
                    marks[0].record()
                    on_gpu = {name: x.to(self._home, non_blocking=True) for name, x in staged.items()}
                    marks[1].record()
                    results = self._compute(on_gpu)
                    marks[2].record()
                    hosts = [to_host(x) for x in results]
                    marks[3].record()
                    stream.synchronize()
                del hosts
                if run >= WARMUPS:
                    times.append([before.elapsed_time(after) for before, after in itertools.pairwise(marks)])
        finally:
            self._streams.put(stream)
        h2d_ms, gpu_ms, d2h_ms = (statistics.median(part) for part in zip(*times, strict=True))
        return DeviceTimes(gpu_ms=gpu_ms, h2d_ms=h2d_ms, d2h_ms=d2h_ms)

    def _revive(self) -> None:
        super()._revive()
        refuse_lost_threads(self.name)
        self._lock = threading.Lock()

    def _release(self) -> None:
        if self._on_gpu:
            wait_for_device(self._home)  # what runs there reads the weights
        with self._lock:
            self._launch = self._loader = None
        if self._holds_tf32:
            tf32.release()
        if self._on_gpu:
            cudnn_benchmark.release()


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return AotiSession(artifact, options)
