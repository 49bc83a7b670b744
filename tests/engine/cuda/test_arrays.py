"""Arrays of other libraries as views of their memory."""

import numpy as np
import pytest
import torch

from deploy.engine.cuda.arrays import view
from deploy.errors import InputError


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool"])
def test_dlpack_is_read_without_a_copy(dtype: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    found = view("'x'", array)
    assert (found.pointer, found.shape, found.dtype) == (array.ctypes.data, (3, 4), dtype)
    assert view("'x'", array[1:]).pointer == array[1:].ctypes.data
    assert view("'x'", np.array(1, dtype=dtype)).shape == ()


def test_dlpack_of_a_transposed_array_is_refused() -> None:
    with pytest.raises(InputError, match="'x' is not contiguous in device memory"):
        view("'x'", np.ones((3, 4), np.float32).T)
    with pytest.raises(InputError, match="'x' has a dtype that no engine takes"):
        view("'x'", torch.ones(3, dtype=torch.complex64))


def test_bfloat16_is_read_by_dlpack() -> None:
    x = torch.ones(3, dtype=torch.bfloat16)
    found = view("'x'", x)
    assert (found.pointer, found.shape, found.dtype) == (x.data_ptr(), (3,), "bfloat16")
