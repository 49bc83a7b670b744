"""DLPack's structures, read and made through ctypes: https://dmlc.github.io/dlpack/latest/c_api.html."""

import ctypes
from typing import Any

import numpy as np

CUDA = 2
"""kDLCUDA."""

_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
"""DLDataTypeCode by the kind of a numpy dtype: kDLInt, kDLUInt, kDLFloat, kDLBool."""

_KINDS = {0: "int", 1: "uint", 2: "float"}
_BFLOAT = 4  # kDLBfloat
_BOOL = 6
_NAME = b"dltensor"


class Tensor(ctypes.Structure):
    """DLTensor, the first member of DLManagedTensor."""

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

    @property
    def dtype(self) -> str | None:
        """A numpy name, or `bfloat16`; None for what neither has."""
        if self.lanes != 1:
            return None
        if (self.code, self.bits) in ((_BFLOAT, 16), (_BOOL, 8)):
            return "bfloat16" if self.code == _BFLOAT else "bool"
        return f"{_KINDS[self.code]}{self.bits}" if self.code in _KINDS and self.bits >= 8 else None

    def sizes(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in range(self.ndim))

    def strides_in_items(self) -> tuple[int, ...] | None:
        """None for C order."""
        return tuple(self.strides[axis] for axis in range(self.ndim)) if self.strides else None


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [("tensor", Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p))]


_api = ctypes.PyDLL(None)
_new = _api.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer = _api.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
_is_valid = _api.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]

_exported: dict[int, tuple[Any, ...]] = {}
"""What lives as long as an exported tensor, by the address of its DLManagedTensor."""


def _delete(address: int) -> None:
    _exported.pop(address, None)


def _destroy(capsule: int) -> None:
    """Called when a capsule dies: one that nobody took has its old name."""
    if _is_valid(capsule, _NAME):
        _delete(_pointer(capsule, _NAME))


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete)
_destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_destroy)


def tensor_of(capsule: object) -> Tensor:
    """The tensor of a capsule that has not been taken."""
    address = _pointer(id(capsule), _NAME)
    return Tensor.from_address(address)


def export(pointer: int, shape: tuple[int, ...], dtype: str, index: int, owner: Any) -> object:
    """A capsule with an array of C order at a device address of GPU `index`; `owner` lives as long as the array is used."""
    managed = _Managed()
    tensor = managed.tensor
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    tensor.data, tensor.device_type, tensor.device_id, tensor.ndim = pointer, CUDA, index, len(shape)
    if dtype == "bfloat16":
        tensor.code, tensor.bits = _BFLOAT, 16
    else:
        tensor.code, tensor.bits = _CODES[np.dtype(dtype).kind], np.dtype(dtype).itemsize * 8
    tensor.lanes = 1
    tensor.shape = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = _deleter
    address = ctypes.addressof(managed)
    _exported[address] = (managed, sizes, owner)
    return _new(address, _NAME, ctypes.cast(_destructor, ctypes.c_void_p))
