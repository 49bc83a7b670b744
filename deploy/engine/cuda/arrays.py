"""Device arrays shared with other libraries without a copy, in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.engine.cuda import LEGACY, Device, Memory, dlpack
from deploy.errors import InputError


@dataclass(frozen=True, kw_only=True)
class View:
    """A C-contiguous array in device memory, and the object that keeps it alive.

    dtype: a numpy name, or `bfloat16`. index: of the GPU; None where the array does not say. stream: handle of the stream that
    its content is made on, which has to be waited for; None where it is there already. writable: whether it may be written to.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    index: int | None
    stream: int | None
    writable: bool
    owner: Any


class DeviceArray:
    """An array in device memory. Other libraries take it without a copy, by `__cuda_array_interface__` or DLPack.

    The work is done when it is handed out, so there is no stream to wait for. Its memory is freed in the order of the legacy
    default stream: a library that uses it on a stream which does not wait for that one (`cudaStreamNonBlocking`, as torch's side
    streams) keeps the array until its work is done.

    dtype: a numpy dtype, or the string `bfloat16`, of which `__cuda_array_interface__` knows nothing.
    """

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: str, device: Device) -> None:
        self.shape = shape
        self.dtype = dtype if dtype == "bfloat16" else np.dtype(dtype)
        self.index = device.index
        self._memory = memory
        self._device = device

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        if not isinstance(self.dtype, np.dtype):
            raise AttributeError("bfloat16 has no __cuda_array_interface__; use DLPack")
        return {
            "data": (self._memory.pointer, False),
            "shape": self.shape,
            "typestr": self.dtype.str,
            "strides": None,
            "stream": None,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule of DLPack 0.x, which every consumer takes. Nothing has to be waited for on `stream`.

        Raises BufferError for another device and for a copy, as the protocol has it.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("this array is handed over where it is, and not copied")
        return dlpack.export(self._memory.pointer, self.shape, str(self.dtype), self.index, self._memory)

    def numpy(self) -> np.ndarray:
        """A copy in host memory, made after what the legacy default stream has been given. Raises InputError for bfloat16."""
        if not isinstance(self.dtype, np.dtype):
            raise InputError("numpy has no bfloat16: take the array by DLPack, as torch.from_dlpack does")
        host = np.empty(self.shape, self.dtype)
        with self._device.active():
            stream = self._device.external(LEGACY)
            pinned = self._device.pinned(host.nbytes)
            if host.nbytes:
                self._memory.read(pinned, stream)
                stream.synchronize()
        host.reshape(-1).view(np.uint8)[:] = pinned
        return host

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {'x'.join(map(str, self.shape))} on cuda:{self.index}>"


def copied(array: np.ndarray, device: Device) -> DeviceArray:
    """A copy of an array in device memory, once it is made."""
    with device.active():
        stream = device.external(LEGACY)
        memory, pinned = device.allocate(array.nbytes, stream), device.pinned(array.nbytes)
        pinned[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if array.nbytes:
            memory.write(pinned, stream)
            stream.synchronize()
    return DeviceArray(memory, array.shape, array.dtype.name, device)


def view(name: str, x: Any) -> View:
    """A view of `x` by `__cuda_array_interface__` or else DLPack. name: what errors call it, quoted. Raises InputError."""
    described = getattr(x, "__cuda_array_interface__", None)
    if described is None:
        return _from_dlpack(name, x)
    shape, dtype = tuple(described["shape"]), np.dtype(described["typestr"])
    strides = described.get("strides")
    if strides is not None and not _contiguous(shape, tuple(strides), dtype.itemsize):
        raise _not_contiguous(name)
    if described.get("mask") is not None:
        raise InputError(f"{name} is a masked array, which no engine takes")
    pointer, read_only = described["data"]
    return View(
        pointer=pointer,
        shape=shape,
        dtype=dtype.name,
        index=None,
        stream=described.get("stream"),
        writable=not read_only,
        owner=x,
    )


def _from_dlpack(name: str, x: Any) -> View:
    on_gpu = int(x.__dlpack_device__()[0]) == dlpack.CUDA
    stream = LEGACY if on_gpu else None  # a producer that is given a stream orders its work before that of the stream
    capsule = x.__dlpack__(stream=stream)
    tensor = dlpack.tensor_of(capsule)
    dtype = tensor.dtype
    if dtype is None:
        raise InputError(f"{name} has a dtype that no engine takes (DLPack code {tensor.code}, {tensor.bits} bits)")
    strides = tensor.strides_in_items()
    if strides is not None and not _contiguous(tensor.sizes(), strides, 1):
        raise _not_contiguous(name)
    # The capsule is not consumed: it frees the tensor when it is itself freed.
    return View(
        pointer=(tensor.data or 0) + tensor.byte_offset,
        shape=tensor.sizes(),
        dtype=dtype,
        index=tensor.device_id,
        stream=stream,
        writable=True,
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
    return InputError(f"{name} is not contiguous in device memory; make it so first (cupy.ascontiguousarray, or a copy)")
