"""`torch.compile`: the module of eager, compiled. Slow to start, because it compiles at the first run of a shape.

Every shape is compiled for itself (`dynamic=False`): code for shapes that are not known is slower.
"""

import logging
import threading
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._C._autograd import DeviceType

from deploy.artifact.artifact import Artifact
from deploy.engine.cuda.capturing import capturing
from deploy.runtime.backends.eager import EagerSession, flatten
from deploy.runtime.catalog import BACKENDS
from deploy.runtime.graph_trees import FIRST_RUNS, graph_trees
from deploy.runtime.profiling import RUNS, WARMUPS, LayerTime
from deploy.runtime.session import Session, SessionOptions
from deploy.runtime.torch_device import version as version

# Even when it compiles for the CPU, the compiler looks for a CUDA toolkit and complains if there is no GPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.getMessage())

_MODES = BACKENDS["compile"].variants[0]
_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of `torch.compile` in which, on a GPU, a run writes over the outputs of the run before: it replays CUDA graphs."""


class CompileSession(EagerSession):
    backend = "compile"

    def _prepare(self, module: torch.nn.Module) -> Any:
        self._lock = threading.Lock()
        self._runs: Counter[Any] = Counter()  # by shapes
        mode = next((name for name in self._variant if name in _MODES), None)
        self._replays = mode in _GRAPH_MODES
        compiled: dict[Any, Any] = {}

        def call(*inputs: torch.Tensor) -> Any:
            key = _layout(inputs)
            if key not in compiled:
                # With fullgraph, code that cannot be compiled is an error; without it, it would silently run as eager. Each has a
                # function of its own: torch compiles one function for eight shapes and then no more.
                compiled[key] = torch.compile(_own_function(module), fullgraph=True, dynamic=False, mode=mode)
            return compiled[key](*inputs)

        return call

    def _call(self, module: Any, inputs: Sequence[torch.Tensor]) -> Any:
        # One call at a time: if several threads check guards at once, they fail at random, and each failure compiles anew until
        # torch refuses. See pytorch/pytorch issues 118260 and 136833.
        with self._lock:
            if not self._replays:
                return super()._call(module, inputs)
            if self.device == "cpu":
                return [x.clone() for x in flatten(module(*inputs))]
            key = _layout(inputs)
            first = self._runs[key] < FIRST_RUNS
            results = graph_trees.run(lambda *given: flatten(module(*given)), inputs, torch.device(self.device), first=first)
            self._runs[key] += 1
            return results

    def _revive(self) -> None:
        super()._revive()
        self._lock = threading.Lock()

    def layer_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> list[LayerTime]:
        """The time of each operator and compiled kernel by torch's profiler; they no longer belong to a module.

        All with the same name are one layer, whose time is the mean over the runs and not the median.
        """
        on_gpu = self.device != "cpu"
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        for _ in range(WARMUPS):
            self.run(feed)
        profile = torch.profiler.profile(activities=activities, acc_events=True)
        profile.start()
        try:
            for _ in range(runs):
                self.run(feed)
        finally:
            with capturing:  # it waits for the whole device
                profile.stop()
        layers = [
            LayerTime(
                name=event.key,
                operator="kernel" if on_gpu else "operator",
                ms=(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / runs,
            )
            for event in profile.key_averages()
            if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
        ]
        return [layer for layer in layers if layer.ms > 0]


def _layout(inputs: Sequence[torch.Tensor]) -> Any:
    return tuple((x.shape, x.stride()) for x in inputs)


def _own_function(module: torch.nn.Module) -> Any:
    """A function that calls `module`, with its own code object.

    torch counts compilations by code object and refuses more than a few, so that sessions on one class would use up each
    other's.
    """

    def call(*inputs: torch.Tensor) -> Any:
        return module(*inputs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return CompileSession(artifact, options)
