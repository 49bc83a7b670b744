"""`torch.cuda` on the simulator: its names are replaced by those here, and tensors "on the GPU" are wrappers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.simulator import torch_streams
from tests.simulator.machine import Machine
from tests.simulator.memory import Allocation
from tests.simulator.torch_memory import CachingAllocator, HostAllocator
from tests.simulator.torch_streams import CUDAGraph, Event, ExternalStream, State, Stream, as_torch, current_stream
from tests.simulator.torch_tensors import CudaTensor, Keeper
from tests.simulator.work import Action

FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "randn", "rand")
"""The functions of torch that can make a tensor on the GPU here."""


class TorchFront:
    """torch as if it had the GPUs of a machine. `install` replaces its names; the test's patch puts them back."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.memory = CachingAllocator(machine)
        self.pinned = HostAllocator(machine)
        State.machine, State.memory = machine, self.memory
        State.pools, State.turn, State.current = {}, {}, threading.local()
        CudaTensor.front = self

    # For tensors.

    def put(self, action: Action, index: int) -> None:
        """Work on tensors of a GPU, whichever is current, on the current stream of that one."""
        before = self._exchange(index)
        try:
            with as_torch():
                self.machine.launch(current_stream(index).inner, action)
        finally:
            self.machine.here.device = before

    def synchronize_current(self, index: int) -> None:
        current_stream(index).synchronize()

    def empty_strided(self, size: Any, stride: Any, dtype: torch.dtype, index: int) -> CudaTensor:
        """An uninitialised tensor of the caching allocator's, for the current stream."""
        if 0 in size:
            return CudaTensor(torch.empty_strided(size, stride, dtype=dtype), None, index)
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        nbytes = (last + 1) * dtype.itemsize
        with as_torch(), self.machine.inside("torch_allocate"):
            block = self.memory.allocate(nbytes, current_stream(index).inner)
        content = self.machine.space.bytes(block.owner.address, nbytes)
        keeper = Keeper(self.machine.dropped, lambda: self.memory.give_back(block))
        keeper.block = block  # type: ignore[attr-defined]
        inside = torch.from_numpy(content).view(dtype).as_strided(size, stride)
        return CudaTensor(inside, keeper, index)

    def record_stream(self, x: CudaTensor, stream: Stream) -> None:
        """Only for memory of torch's; each stream once."""
        block = getattr(x.keeper, "block", None)
        self.machine.calls["record_stream"] += 1
        if block is not None and stream.inner not in block.used_by:
            block.used_by.append(stream.inner)

    def pinned_owner(self, x: torch.Tensor) -> Allocation | None:
        segment = self.machine.space.at(x.data_ptr()) if x.numel() else None
        return segment.owner if segment is not None and segment.owner is not None and segment.owner.device is None else None

    def pools(self) -> list[list[Stream]]:
        """The streams that torch made."""
        return list(State.pools.values())

    # In place of torch's functions.

    def factory(self, name: str) -> Callable[..., torch.Tensor]:
        original: Callable[..., torch.Tensor] = getattr(torch, name)

        def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            if pin_memory:
                return self._pinned(original(*args, **kwargs))
            if device is None or torch.device(device).type != "cuda":
                return original(*args, device=device, **kwargs)
            index = torch_streams._index(device)
            if name == "empty":
                shape = original(*args, device="meta", **kwargs)
                return self.empty_strided(shape.shape, shape.stride(), shape.dtype, index)
            return self.upload(original(*args, **kwargs), index)

        return make

    def _pinned(self, like: torch.Tensor) -> torch.Tensor:
        with as_torch(), self.machine.inside("torch_pin"):
            owner = self.pinned.allocate(like.nbytes)
        keeper = Keeper(self.machine.dropped, lambda: self.pinned.give_back(owner), owner)
        return torch.from_numpy(np.asarray(keeper)[: like.nbytes]).view(like.dtype).view(like.shape)

    def upload(self, x: torch.Tensor, index: int, *, non_blocking: bool = False) -> CudaTensor:
        made = self.empty_strided(x.shape, torch.empty(x.shape, device="meta").stride(), x.dtype, index)
        if x.numel():
            made.copy_(x, non_blocking=non_blocking)
        return made

    def to(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device", args[0] if args and isinstance(args[0], (str, torch.device, int)) else None)
            if device is None or torch.device(device).type != "cuda":
                return original(x, *args, **kwargs)
            rest = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
            if isinstance(x, CudaTensor):
                assert x.device.index == torch_streams._index(device), "not modelled: copies between GPUs"
                return original(x, *args[1:], **rest) if args[1:] or rest else x
            x = original(x, *args[1:], **rest) if args[1:] or rest else x
            return self.upload(x, torch_streams._index(device), non_blocking=kwargs.get("non_blocking", False))

        return to

    def as_tensor(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def as_tensor(x: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
            described = getattr(x, "__cuda_array_interface__", None)
            if isinstance(x, torch.Tensor) or described is None:
                return original(x, dtype=dtype, device=device)
            address, shape = described["data"][0], tuple(described["shape"])
            kind = np.dtype(described["typestr"])
            nbytes = int(np.prod(shape)) * kind.itemsize
            self.machine.space.find(address, nbytes, "torch.as_tensor")
            content = self.machine.space.bytes(address, nbytes).view(kind).reshape(shape)
            return CudaTensor(torch.from_numpy(content), x, torch_streams._index(device))

        return as_tensor

    def install(self, patch: pytest.MonkeyPatch) -> None:
        machine = self.machine
        names: dict[str, Any] = {
            "Stream": Stream, "ExternalStream": ExternalStream, "Event": Event, "CUDAGraph": CUDAGraph,
            "current_stream": current_stream, "default_stream": torch_streams.default_stream, "set_stream": torch_streams.set_stream,
            "is_available": lambda: True, "device_count": lambda: machine.devices, "is_initialized": lambda: True,
            "_lazy_init": lambda: None, "current_device": lambda: machine.here.device, "set_device": self._set_device,
            "_exchange_device": self._exchange, "_maybe_exchange_device": self._exchange, "synchronize": self._synchronize,
            "get_device_name": lambda device=None: "Simulated GPU", "get_device_capability": lambda device=None: (8, 9),
            "mem_get_info": self._mem_get_info, "empty_cache": self._empty_cache, "memory_allocated": lambda device=None: self.memory.allocated,
            "is_current_stream_capturing": lambda: current_stream().inner.capture is not None,
            "_sleep": lambda cycles: self.put(Action("torch.cuda._sleep", (), kernel=True), machine.here.device),
        }  # fmt: skip
        for name, value in names.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda.graphs, "CUDAGraph", CUDAGraph)
        patch.setattr(torch.cuda.graph, "default_capture_stream", None)
        patch.setattr(torch._C, "_host_emptyCache", lambda: None)
        for name in FACTORIES:
            patch.setattr(torch, name, self.factory(name))
        patch.setattr(torch, "as_tensor", self.as_tensor(torch.as_tensor))
        to = self.to(torch.Tensor.to)
        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(
            torch.Tensor, "cuda", lambda x, device=None, **kwargs: to(x, "cuda" if device is None else device, **kwargs)
        )
        patch.setattr(torch.Tensor, "pin_memory", lambda x: self._pinned(x).copy_(x))

    def _set_device(self, device: Any) -> None:
        self.machine.here.device = torch_streams._index(device)

    def _exchange(self, device: int) -> int:
        before = self.machine.here.device
        if device is not None and device >= 0:
            self.machine.here.device = device
        return before

    def _synchronize(self, device: Any = None) -> None:
        before = self._exchange(torch_streams._index(device))
        try:
            with as_torch():
                self.machine.device_synchronize()
        finally:
            self.machine.here.device = before

    def _mem_get_info(self, device: Any = None) -> tuple[int, int]:
        used = self.machine.space.used.get(torch_streams._index(device), 0)
        return self.machine.space.total - used, self.machine.space.total

    def _empty_cache(self) -> None:
        with as_torch(), self.machine.inside("empty_cache"):
            self.memory.empty_cache(self.machine.here.device)
