"""Device arrays shared with other libraries without a copy, in both directions."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.engine.cuda import Device, Memory, Stream
from deploy.errors import InputError

_CUDA = 2
"""kDLCUDA of dlpack.h."""

_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}
"""DLDataTypeCode of dlpack.h: kDLInt, kDLUInt, kDLFloat, kDLBool."""


_LEGACY = 1
"""The legacy default stream: a producer that is given it orders its work before that of the stream."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A C-contiguous array in device memory, and the object that keeps it alive.

    index: of the GPU; None where the array does not say. stream: handle of the stream that its content is made on, which
    has to be waited for; None where it is there already.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    index: int | None
    stream: int | None
    owner: Any


class DeviceArray:
    """An output in device memory. CuPy, torch, Numba and pycuda accept it without a copy, by `__cuda_array_interface__`.

    The work is done when it is handed out, so there is no stream to wait for.
    """

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device, stream: Stream) -> None:
        self.shape = shape
        self.dtype = dtype
        self.index = device.index
        self._memory = memory
        self._device = device
        self._stream = stream
        self.__cuda_array_interface__: Mapping[str, Any] = {
            "data": (memory.pointer, False),
            "shape": shape,
            "typestr": dtype.str,
            "strides": None,
            "stream": None,
            "version": 3,
        }

    def numpy(self) -> np.ndarray:
        """A copy in host memory."""
        count = int(np.prod(self.shape)) * self.dtype.itemsize
        host = self._device.pinned(count)[:count]
        self._memory.read(host, self._stream)
        self._stream.synchronize()
        return host.copy().view(self.dtype).reshape(self.shape)

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {'x'.join(map(str, self.shape))} on cuda:{self._device.index}>"


def view(name: str, x: Any) -> View:
    """A view of `x` by `__cuda_array_interface__` or else DLPack. name: what errors call it. Raises InputError."""
    described = getattr(x, "__cuda_array_interface__", None)
    if described is None:
        return _from_dlpack(name, x)
    shape, dtype = tuple(described["shape"]), np.dtype(described["typestr"])
    strides = described.get("strides")
    if strides is not None and not _contiguous(shape, tuple(strides), dtype.itemsize):
        raise _not_contiguous(name)
    if described.get("mask") is not None:
        raise InputError(f"{name!r} is a masked array, which no engine takes")
    return View(pointer=described["data"][0], shape=shape, dtype=dtype, index=None, stream=described.get("stream"), owner=x)


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h, the first member of DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def _from_dlpack(name: str, x: Any) -> View:
    on_gpu = int(x.__dlpack_device__()[0]) == _CUDA
    stream = _LEGACY if on_gpu else None
    capsule = x.__dlpack__(stream=stream)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
    if tensor.code not in _KINDS or tensor.lanes != 1:
        raise InputError(f"{name!r} has a dtype that numpy lacks (DLPack code {tensor.code}, {tensor.bits} bits)")
    dtype = np.dtype(f"{_KINDS[tensor.code]}{tensor.bits // 8}")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim))
        if not _contiguous(shape, strides, dtype.itemsize):
            raise _not_contiguous(name)
    # The capsule is not consumed: it frees the tensor when it is itself freed.
    return View(
        pointer=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        dtype=dtype,
        index=tensor.device_id,
        stream=stream,
        owner=(x, capsule),
    )


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether the elements follow each other without gaps; the stride of a dimension of size 1 does not matter."""
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != itemsize:
            return False
        itemsize *= size
    return True


def _not_contiguous(name: str) -> InputError:
    return InputError(f"{name!r} is not contiguous in device memory; make it so first (cupy.ascontiguousarray, or a copy)")
