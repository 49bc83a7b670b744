"""The time that each module of a PyTorch model takes, by torch's profiler."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch._C._autograd import DeviceType

from deploy.errors import BackendError
from deploy.runtime.profiling import WARMUPS, LayerTime
from deploy.runtime.torch_device import wait_for_device

_REGION = "deploy module "


def module_times(module: torch.nn.Module, inputs: Sequence[torch.Tensor], runs: int) -> list[LayerTime]:
    """The time of each module in `module`, less that of the modules it calls, in the order of the first call.

    It is the time on the GPU if `inputs` are there. Raises BackendError if the calls differ from run to run.
    """
    names = {part: name for name, part in module.named_modules()}
    regions: list[Any] = []

    def enter(part: torch.nn.Module, _: Any) -> None:
        regions.append(torch.profiler.record_function(f"{_REGION}{names[part]}"))
        regions[-1].__enter__()

    def leave(_: torch.nn.Module, __: Any, ___: Any) -> None:
        regions.pop().__exit__(None, None, None)

    on_gpu = any(x.is_cuda for x in inputs)
    handles = [part.register_forward_pre_hook(enter) for part in names]
    handles += [part.register_forward_hook(leave) for part in names]
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    try:
        for _ in range(WARMUPS):
            module(*inputs)
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for _ in range(runs):
                module(*inputs)
            if on_gpu:
                wait_for_device(inputs[0].device)
    finally:
        for handle in handles:
            handle.remove()
    series: dict[str, list[float]] = {}
    for event in profile.events():
        if event.name.startswith(_REGION) and event.device_type == DeviceType.CPU:
            took = event.device_time_total if on_gpu else event.cpu_time_total
            series.setdefault(event.name.removeprefix(_REGION), []).append(took / 1e3)
    if any(len(times) % runs for times in series.values()):
        raise BackendError("the module does not call the same modules in every run: its time cannot be split by module")
    whole = {name: statistics.median(np.reshape(times, (runs, -1)).sum(axis=1)) for name, times in series.items()}
    kinds = {name: type(part).__name__ for part, name in names.items()}
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
