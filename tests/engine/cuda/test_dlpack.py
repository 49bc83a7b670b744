"""Capsules of DLPack that are made here, taken by torch and numpy, or by nobody."""

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deploy.engine.cuda import dlpack


class Owner:
    """What keeps the memory."""


class OnHost:
    """An array in host memory, handed over by our capsule: torch and numpy take nothing from a GPU that is not there."""

    def __init__(self, array: np.ndarray, owner: Owner) -> None:
        self.array, self.owner = array, owner

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> object:
        capsule = dlpack.export(self.array.ctypes.data, self.array.shape, self.array.dtype.name, 0, self.owner)
        dlpack.tensor_of(capsule).device_type = 1
        return capsule


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
def test_a_capsule_says_what_the_array_is(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = dlpack.tensor_of(capsule := dlpack.export(4096, shape, dtype, 3, None))
    assert (tensor.dtype, tensor.sizes(), tensor.data, tensor.byte_offset) == (dtype, shape, 4096, 0)
    assert (tensor.device_type, tensor.device_id, tensor.strides_in_items()) == (dlpack.CUDA, 3, None)
    del capsule


@pytest.mark.parametrize("take", [torch.from_dlpack, np.from_dlpack])
def test_the_memory_lives_as_long_as_who_took_it(take: Callable[[Any], Any]) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    owner = Owner()
    alive = weakref.ref(owner)
    taken = take(OnHost(array, owner))
    del owner
    gc.collect()
    assert alive() is not None
    np.testing.assert_array_equal(np.asarray(taken), array)
    array[0, 0] = 7
    assert float(taken[0, 0]) == 7  # the same memory
    del taken
    gc.collect()
    assert alive() is None


def test_a_capsule_that_nobody_takes_lets_go_of_the_memory() -> None:
    owner = Owner()
    alive = weakref.ref(owner)
    capsule: object = dlpack.export(4096, (2,), "float32", 0, owner)
    del owner
    gc.collect()
    assert alive() is not None
    del capsule
    assert alive() is None


def test_dtypes_that_no_array_has_here_are_none() -> None:
    tensor = dlpack.Tensor(code=5, bits=64, lanes=1)  # kDLComplex
    assert tensor.dtype is None
    assert dlpack.Tensor(code=2, bits=32, lanes=4).dtype is None
    assert ctypes.sizeof(dlpack.Tensor) == 48  # as in dlpack.h on a 64-bit machine
