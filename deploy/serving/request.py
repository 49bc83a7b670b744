"""An inference request as both doors understand it: its tensors, and the options of the request, of inputs and of outputs.

An option is done or refused, never ignored.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.runtime.batching.queue import NORMAL_PRIORITY

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16",
}  # fmt: skip
"""The protocol's datatypes, by numpy's names (and `bfloat16`)."""

DATATYPE_OF = {np.dtype(name): datatype for name, datatype in DATATYPES.items() if name != "bfloat16"}  # which is torch's alone
"""The protocol's datatypes, by numpy's dtypes."""

_MOST_DIMS = 32
_MOST_ELEMENTS = 1 << 40
_LONGEST_ID = 1024
_MAX_TIMEOUT_US = 2**62
_MAX_BYTES = 2**62

_REGION, _SIZE, _OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"
_PLACE = frozenset((_REGION, _SIZE, _OFFSET))
_OF_REQUESTS = frozenset(("binary_data_output", "content_type", "priority", "timeout", "triton_enable_empty_final_response"))
_OF_INPUTS = frozenset(("binary_data_size", "content_type")) | _PLACE
_OF_OUTPUTS = frozenset(("binary_data", "classification")) | _PLACE

Options = Mapping[str, Any]


class Place(NamedTuple):
    """Where a tensor lies in a region of shared memory that the client has registered; offset and size in bytes."""

    region: str
    offset: int
    size: int


class Wanted(NamedTuple):
    """An output that the client wants. binary: not in JSON, or in raw_output_contents over gRPC. classes: so many of the likeliest
    classes in place of the numbers; 0 for the numbers. place: where the numbers go; None into the answer.
    """

    name: str
    binary: bool = False
    classes: int = 0
    place: Place | None = None


class InferRequest(NamedTuple):
    """An inference request. timeout_s: None for no limit."""

    id: str
    feed: dict[str, np.ndarray]
    outputs: tuple[Wanted, ...]
    priority: int
    timeout_s: float | None


def id_of(value: Any) -> str:
    """The id of a request. Raises InputError."""
    if not isinstance(value, str) or len(value) > _LONGEST_ID:
        raise InputError(f"id must be a string of at most {_LONGEST_ID} characters")
    return value


def check_options(options: Options) -> None:
    """Raise InputError for an option of a request that is not known."""
    _check_known(options, _OF_REQUESTS, "the request")


def place_of_input(options: Options, name: str) -> Place | None:
    """Where an input lies in shared memory, None where it comes with the request. Raises InputError for options that are not known."""
    _check_known(options, _OF_INPUTS, f"input {name!r}")
    return _place(options, name)


def wanted_output(name: str, options: Options, *, binary: bool) -> Wanted:
    """An output with its options. binary: the default. Raises InputError."""
    _check_known(options, _OF_OUTPUTS, f"output {name!r}")
    place = _place(options, name)
    classes = _number(options.get("classification", 0), f"classification of {name!r}", 0, 2**31)
    if place is not None and classes:
        raise InputError(f"{name!r} cannot be both classes and in shared memory")
    return Wanted(name=name, binary=flag(options, "binary_data", binary), classes=classes, place=place)


def flag(options: Options, name: str, default: bool = False) -> bool:
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false")
    return value


def _check_known(options: Options, known: frozenset[str], what: str) -> None:
    for name, value in options.items():
        if name not in known:
            raise InputError(
                f"{what} has the parameter {name!r}, which is not supported here; known are {', '.join(sorted(known))}"
            )
        if name == "content_type" and value != "np":
            raise InputError(f"content_type of {what} is {value!r}; tensors are 'np', and nothing else is taken")


def _place(options: Options, name: str) -> Place | None:
    region = options.get(_REGION)
    if region is None:
        if given := _PLACE & options.keys():
            raise InputError(f"{name!r} has {min(given)}, but no {_REGION}")
        return None
    if not isinstance(region, str):
        raise InputError(f"{_REGION} of {name!r} must be a string")
    return Place(
        region=region,
        offset=_number(options.get(_OFFSET, 0), f"{_OFFSET} of {name!r}", 0, _MAX_BYTES),
        size=_number(options.get(_SIZE), f"{_SIZE} of {name!r}", 0, _MAX_BYTES),
    )


def _number(value: Any, what: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{what} must be a number from {least} to {most}, not {value!r}")
    return value


def priority_of(value: Any) -> int:
    """The priority for the batcher: 1 is the highest; 0 and None give the normal one. Raises InputError."""
    return _number(value or 0, "priority", 0, 2**32 - 1) or NORMAL_PRIORITY


def timeout_of(value: Any) -> float | None:
    """A timeout in seconds, from microseconds; 0 and None give None. Raises InputError."""
    return _number(value or 0, "timeout", 0, _MAX_TIMEOUT_US) / 1e6 or None


def elements(shape: Sequence[int], name: str) -> int:
    """The number of elements of a tensor of this shape. Raises InputError for an impossible shape; `name` is the tensor's."""
    if len(shape) > _MOST_DIMS:
        raise InputError(f"{name!r} has {len(shape)} dimensions")
    count = 1
    for size in shape:
        if size < 0:
            raise InputError(f"{name!r} has a dimension of {size}")
        count *= size
        if count > _MOST_ELEMENTS:
            raise InputError(f"{name!r} has too many elements")
    return count


def check_size(size: int, spec: TensorSpec, shape: Sequence[int]) -> None:
    """Raise InputError if `size` is not the number of bytes of a tensor of this shape."""
    wanted = elements(shape, spec.name) * np.dtype(spec.dtype).itemsize
    if size != wanted:
        raise InputError(f"{spec.name!r} has {size} bytes of data; its shape takes {wanted}")


def from_bytes(data: memoryview | bytes | bytearray, spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    """An array that shares the memory of little-endian `data`. Raises InputError if the number of bytes does not fit `shape`."""
    check_size(len(data), spec, shape)
    array = np.frombuffer(data, dtype=np.dtype(spec.dtype).newbyteorder("<")).reshape(shape)
    if spec.dtype == "bool" and array.view(np.uint8).max(initial=0) > 1:
        raise InputError(f"{spec.name!r} is BOOL: its bytes must be 0 or 1")
    return array.astype(spec.dtype, copy=False)


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order, of any dtype; a copy only where it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def check_datatype(datatype: Any, spec: TensorSpec) -> None:
    """Raise InputError unless `datatype` is the input's datatype in the protocol."""
    expected = DATATYPES[spec.dtype]
    if datatype != expected:
        raise InputError(f"{spec.name!r} has datatype {datatype!r}; expected {expected}")


def check_outputs(outputs: Sequence[Wanted]) -> tuple[Wanted, ...]:
    """The outputs. Raises InputError if one is asked for twice."""
    names = [output.name for output in outputs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"output {name!r} is asked for twice")
    return tuple(outputs)
