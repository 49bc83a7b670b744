"""Runs of an engine on arrays on the GPU: torch tensors, and arrays of other libraries.

A call says where the inputs are, which streams they are made on, and where the outputs go.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deploy.artifact.tensors import TensorSpec, format_shape
from deploy.engine.context import Place, Shape
from deploy.engine.cuda import LEGACY, Device, DeviceMemoryError, Stream
from deploy.engine.cuda.arrays import DeviceArray, View, view
from deploy.errors import InputError
from deploy.runtime.arrays import is_device_array

Out = Mapping[str, Any]
"""The arrays of the caller's that outputs are written to, by name."""


class Call(NamedTuple):
    """The arguments of a run of `EngineContext`. kept: what must live until it is queued."""

    inputs: list[int]
    shapes: tuple[Shape, ...]
    callers: Sequence[Stream]
    place: Place
    kept: Sequence[Any]


class _Calls:
    """What both kinds need: the GPU, the inputs and outputs, and the inputs that are read on the host."""

    def __init__(self, gpu: Device, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], host: frozenset[str]) -> None:
        self.gpu = gpu
        self.device = f"cuda:{gpu.index}"
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.host = host

    def check_out(self, out: Out) -> None:
        """Raise InputError for arrays that the engine cannot write to; their shapes are compared when they are known."""
        specs = {spec.name: spec for spec in self.outputs}
        for name, target in out.items():
            if name not in specs:
                raise InputError(f"unknown output {name!r} in out; expected one of {', '.join(specs)}")
            self._check_target(f"out[{name!r}]", target, specs[name])

    def _check_target(self, name: str, target: Any, spec: TensorSpec) -> None:
        raise NotImplementedError

    def _placed(self, out: Out | None, address: Callable[[Any], int], make: Callable[[int, Shape], tuple[int, Any]]) -> Place:
        """Outputs go to the arrays of `out`, and the others to new ones."""
        if not out:
            return make

        def place(index: int, shape: Shape) -> tuple[int, Any]:
            name = self.outputs[index].name
            if name not in out:
                return make(index, shape)
            target = out[name]
            if tuple(target.shape) != shape:
                raise InputError(f"out[{name!r}] has shape {format_shape(tuple(target.shape))}; expected {format_shape(shape)}")
            return address(target), target

        return place


class TorchCalls(_Calls):
    """Calls on torch tensors, on the caller's current stream: new outputs belong to it, as those of torch's functions do."""

    def __init__(self, gpu: Device, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], host: frozenset[str]) -> None:
        super().__init__(gpu, inputs, outputs, host)
        torch = sys.modules["torch"]
        self._torch = torch
        self._names = [spec.name for spec in inputs]
        self._here = torch.device(self.device)
        self._dtypes = [getattr(torch, spec.dtype) for spec in outputs]

    def call(self, feed: Mapping[str, Any], out: Out | None) -> Call:
        """Raises InputError for a tensor on another device."""
        stream = self._torch.cuda.current_stream(self._here)
        inputs, shapes, kept = [], [], []
        for name in self._names:
            x = feed[name]
            if name in self.host:
                inputs.append(0)
                shapes.append(x.shape)
                continue
            if x.device != self._here:
                raise self.elsewhere(name, x)
            if x.is_contiguous():
                x.record_stream(stream)  # its memory is not reused before the work is done
            else:
                x = x.contiguous()
                kept.append(x)
            inputs.append(x.data_ptr())
            shapes.append(x.shape)
        place = self._placed(out, _data_ptr, self._make)
        return Call(inputs, tuple(shapes), (self.gpu.external(stream.cuda_stream),), place, kept)

    def elsewhere(self, name: str, x: Any) -> InputError:
        return InputError(f"{name!r} is on {x.device}; this session is on {self.device}: move it, or open one there")

    def _make(self, index: int, shape: Shape) -> tuple[int, Any]:
        try:
            tensor = self._torch.empty(shape, dtype=self._dtypes[index], device=self._here)
        except self._torch.cuda.OutOfMemoryError:
            self.gpu.trim()
            tensor = self._last_try(index, shape)
        return tensor.data_ptr(), tensor

    def _last_try(self, index: int, shape: Shape) -> Any:
        dtype = self._dtypes[index]
        try:
            return self._torch.empty(shape, dtype=dtype, device=self._here)
        except self._torch.cuda.OutOfMemoryError as error:
            raise DeviceMemoryError(int(np.prod(shape)) * dtype.itemsize, *self.gpu.memory()) from error

    def _check_target(self, name: str, target: Any, spec: TensorSpec) -> None:
        if not isinstance(target, self._torch.Tensor):
            raise InputError(f"{name} is a {type(target).__name__}; expected a torch tensor, as the feed has")
        if target.device != self._here:
            raise InputError(f"{name} is on {target.device}; this session is on {self.device}")
        if str(target.dtype) != f"torch.{spec.dtype}":
            raise InputError(f"{name} is {target.dtype}; expected {spec}")
        if not target.is_contiguous():
            raise InputError(f"{name} is not contiguous; make it so first")


def _data_ptr(tensor: Any) -> int:
    return int(tensor.data_ptr())


class ArrayCalls(_Calls):
    """Calls on arrays of other libraries. New outputs are `DeviceArray`s, which belong to the legacy default stream."""

    def call(self, feed: Mapping[str, Any], out: Out | None) -> Call:
        """Raises InputError for an array of another dtype than the input's, or on another GPU."""
        views = {
            spec.name: self._view(repr(spec.name), feed[spec.name], spec) for spec in self.inputs if spec.name not in self.host
        }
        targets = {name: self._view(f"out[{name!r}]", x, None) for name, x in (out or {}).items()}
        made_on = [x.stream for x in (*views.values(), *targets.values()) if x.stream is not None]
        callers = [self.gpu.external(handle) for handle in dict.fromkeys([LEGACY, *(handle or LEGACY for handle in made_on)])]
        return Call(
            [views[spec.name].pointer if spec.name in views else 0 for spec in self.inputs],
            tuple([tuple(feed[spec.name].shape) for spec in self.inputs]),
            callers,
            self._placed(targets, lambda target: int(target.pointer), self._make),
            (views, targets),
        )

    def _make(self, index: int, shape: Shape) -> tuple[int, Any]:
        dtype = self.outputs[index].dtype
        itemsize = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
        memory = self.gpu.allocate(int(np.prod(shape)) * itemsize, self.gpu.external(LEGACY))
        return memory.pointer, DeviceArray(memory, shape, dtype, self.gpu)

    def _view(self, name: str, x: Any, spec: TensorSpec | None) -> View:
        found = view(name, x)
        if spec is not None and found.dtype != spec.dtype:
            raise InputError(f"{name} is {found.dtype}; expected {spec}")
        index = found.index
        if index is None and self.gpu.count > 1 and found.pointer:
            with self.gpu.active():
                index = self.gpu.owner(found.pointer)
        if index is not None and index != self.gpu.index:
            raise InputError(f"{name} is on cuda:{index}; this session is on {self.device}")
        return found

    def _check_target(self, name: str, target: Any, spec: TensorSpec) -> None:
        if not is_device_array(target):
            raise InputError(f"{name} is a {type(target).__name__}; expected an array on the GPU, as the feed has")
        if not self._view(name, target, spec).writable:
            raise InputError(f"{name} is read-only")
