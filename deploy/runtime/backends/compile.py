"""The module through `torch.compile`. Slow to start: it compiles at the first run of a shape."""

import logging
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._C._autograd import DeviceType

from deploy.artifact.artifact import Artifact
from deploy.runtime.backends.eager import EagerSession, flatten
from deploy.runtime.backends.eager import version as version  # it is torch too
from deploy.runtime.catalog import BACKENDS
from deploy.runtime.profiling import RUNS, WARMUPS, LayerTime
from deploy.runtime.session import Session, SessionOptions

# The compiler looks for a CUDA toolkit wherever it runs, and complains of one that has no GPU, while it compiles for the CPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.getMessage())

_MODES = BACKENDS["compile"].variants[0]
_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of `torch.compile` in which, on a GPU, a run writes over the outputs of the run before: it replays CUDA graphs."""


class CompileSession(EagerSession):
    backend = "compile"

    def _prepare(self, module: torch.nn.Module) -> Any:
        self._lock = threading.Lock()
        mode = next((name for name in self._variant if name in _MODES), None)
        self._replays = mode in _GRAPH_MODES
        # With fullgraph, what cannot be compiled is an error; without, it would run as eager in silence.
        return torch.compile(_own_function(module), fullgraph=True, mode=mode)

    def _call(self, module: Any, inputs: Sequence[torch.Tensor]) -> Any:
        # One call at a time. Guards that threads check at once fail at random, and each failure compiles anew until torch
        # refuses: pytorch/pytorch issues 118260 and 136833.
        with self._lock:
            if not self._replays:
                return module(*inputs)
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return [x.clone() for x in flatten(module(*inputs))]

    def layer_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> list[LayerTime]:
        """By torch's profiler: the time of each operator and compiled kernel, which belong to no module any longer.

        Those of one name are one layer; its time is the mean over the runs and not the median.
        """
        on_gpu = self.device != "cpu"
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        for _ in range(WARMUPS):
            self.run(feed)
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for _ in range(runs):
                self.run(feed)
        found = [
            LayerTime(
                name=event.key,
                operator="kernel" if on_gpu else "operator",
                ms=(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / runs,
            )
            for event in profile.key_averages()
            if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
        ]
        return [layer for layer in found if layer.ms > 0]


def _own_function(module: torch.nn.Module) -> Any:
    """A call of `module` with a code object of its own.

    torch counts compilations by code object and refuses more than a few: sessions on one class would use up one another's.
    """

    def call(*inputs: torch.Tensor) -> Any:
        return module(*inputs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return CompileSession(artifact, options)
