"""The sorts of arrays in feeds and results: numpy arrays, torch tensors, device arrays of other libraries."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from deploy.artifact.tensors import format_shape
from deploy.errors import InputError
from deploy.words import a_type

Sort = Literal["numpy", "torch", "device"]
"""`device` stands for arrays in device memory of any library but torch."""

SORTS = {"numpy": "numpy arrays", "torch": "torch tensors", "device": "other arrays on the GPU"}
_DLPACK_CUDA = 2  # kDLCUDA of dlpack.h


def sort_of(name: str, x: Any, *, device_arrays: bool) -> Sort:
    """The sort of one input. device_arrays: device arrays are allowed. Raises InputError for anything else."""
    if isinstance(x, np.ndarray):
        return "numpy"
    if type(x).__module__.partition(".")[0] == "torch" and hasattr(x, "detach"):
        return "torch"
    if device_arrays and is_device_array(x):
        return "device"
    others = ", or an array on the GPU" if device_arrays else ""
    raise InputError(f"{name!r} is {a_type(x)}; expected a numpy array or a torch tensor{others}")


def is_device_array(x: Any) -> bool:
    """Whether `x` is in device memory, by `__cuda_array_interface__` or by DLPack."""
    if hasattr(x, "__cuda_array_interface__"):
        return True
    device = getattr(x, "__dlpack_device__", None)
    return device is not None and int(device()[0]) == _DLPACK_CUDA


def writable(x: np.ndarray) -> np.ndarray:
    """`x` itself if torch can share its memory, else a copy (torch has no read-only tensors)."""
    return x if x.flags.writeable and x.flags.c_contiguous else x.copy()


def pinned(x: np.ndarray) -> Any:
    """`x` as a torch tensor in pinned memory, from which a copy to a GPU is fast and does not stop the CPU."""
    return sys.modules["torch"].from_numpy(writable(x)).pin_memory()


def to_host(x: Any) -> Any:
    """A torch tensor on a GPU, copied to pinned memory, where it is once its stream has come so far."""
    return sys.modules["torch"].empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def to_torch(x: np.ndarray, device: str) -> Any:
    """`x` as a torch tensor on `device`: `cpu`, where it shares the memory of `x` if it can, or `cuda:N`, through pinned memory."""
    if device == "cpu":
        return sys.modules["torch"].from_numpy(writable(x))
    return pinned(x).to(device, non_blocking=True)


def from_torch(results: Sequence[Any]) -> list[np.ndarray]:
    """torch tensors as numpy arrays. Those on a GPU are copied through pinned memory, after which their stream is waited for."""
    if not any(x.is_cuda for x in results):
        return [x.numpy(force=True) for x in results]
    hosts = [to_host(x) for x in results]
    for device in {x.device for x in results if x.is_cuda}:
        sys.modules["torch"].cuda.current_stream(device).synchronize()
    return [host.numpy().copy() for host in hosts]  # pinned memory is scarce: it is not the caller's to keep


def write(results: dict[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the results into the arrays of `out`; the results by name.

    Raises InputError, and copies none, if one does not fit.
    """
    for name, target in out.items():
        if name not in results:
            raise InputError(f"unknown output {name!r} in out; expected one of {', '.join(results)}")
        result = results[name]
        if type(target) is not type(result) or target.shape != result.shape or target.dtype != result.dtype:
            given = " ".join(
                str(part) for part in (type(target).__name__, getattr(target, "dtype", ""), shape_of(target)) if part
            )
            raise InputError(f"out[{name!r}] is {given}; expected {type(result).__name__} {result.dtype} {shape_of(result)}")
        if isinstance(target, np.ndarray) and not target.flags.writeable:
            raise InputError(f"out[{name!r}] is read-only")
    for name, target in out.items():
        target[...] = results[name]
        results[name] = target
    return results


def shape_of(x: Any) -> str:
    return format_shape(tuple(x.shape)) if hasattr(x, "shape") else ""
