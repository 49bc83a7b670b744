"""The tensors of the Open Inference Protocol v2 over REST: JSON, and Triton's binary extension, to numpy arrays and back.

The protocol: KServe, "Open Inference Protocol (V2)". The extension: Triton Inference Server, "Binary Tensor Data Extension". All that
a client sends is checked here before it is used.
"""

import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.runtime.batching.queue import NORMAL_PRIORITY

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16",
}  # fmt: skip
"""The protocol's datatypes, by numpy's names (and `bfloat16`)."""

_MOST_DIMS = 32
_MOST_ELEMENTS = 1 << 40
_LONGEST_ID = 1024
_MAX_TIMEOUT_US = 2**62

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """An inference request.

    outputs: the names of the outputs to return, with whether in binary. timeout_s: None for no limit.
    """

    id: str
    feed: dict[str, np.ndarray]
    outputs: tuple[tuple[str, bool], ...]
    priority: int
    timeout_s: float | None


def parse_request(
    body: bytes, header_length: int | None, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> InferRequest:
    """Parse a request: the first `header_length` bytes of `body` are JSON (None: all bytes), the rest are binary tensors.

    inputs, outputs: those of the model. Raises InputError.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise InputError(f"Inference-Header-Content-Length is {header_length}; the body has {len(body)} bytes")
    head = memoryview(body)[:header_length]
    rest = memoryview(body)[len(head) :]
    try:
        document = msgspec.json.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the request is no JSON: {error}") from None
    document = _object(document, "the request")
    id_ = document.get("id", "")
    if not isinstance(id_, str) or len(id_) > _LONGEST_ID:
        raise InputError(f"id must be a string of at most {_LONGEST_ID} characters")
    parameters = _parameters(document, "the request")
    feed: dict[str, np.ndarray] = {}
    at = 0
    for entry in _list(document, "inputs"):
        entry = _object(entry, "an input")
        spec = _named(entry, inputs, "input")
        if spec.name in feed:
            raise InputError(f"input {spec.name!r} is given twice")
        feed[spec.name], at = _tensor(entry, spec, rest, at)
    if at != len(rest):
        raise InputError(f"the inputs take {at} bytes of binary data; the body has {len(rest)}")
    if missing := [str(spec) for spec in inputs if spec.name not in feed]:
        raise InputError(f"missing {', '.join(missing)}")
    return InferRequest(
        id=id_,
        feed=feed,
        outputs=_asked(document, outputs, default=_flag(parameters, "binary_data_output")),
        priority=priority_of(parameters.get("priority")),
        timeout_s=timeout_of(parameters.get("timeout")),
    )


def build_response(name: str, version: str, request: InferRequest, results: Mapping[str, np.ndarray]) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON if binary tensors follow, else None. In JSON, NaN and infinities are null."""
    entries = []
    binary = []
    for output, is_binary in request.outputs:
        array = results[output]
        entry: Json = {"name": output, "datatype": DATATYPES[str(array.dtype)], "shape": list(array.shape)}
        if is_binary:
            data = np.ascontiguousarray(array).tobytes()
            entry["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            entry["data"] = array.reshape(-1).tolist()
        entries.append(entry)
    document: Json = {"model_name": name, "model_version": version, "outputs": entries}
    if request.id:
        document["id"] = request.id
    head = msgspec.json.encode(document)
    return (b"".join((head, *binary)), len(head)) if binary else (head, None)


def priority_of(value: Any) -> int:
    """The priority for the batcher: 1 is the highest; 0 and None give the normal one. Raises InputError."""
    if value is None or value == 0:
        return NORMAL_PRIORITY
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**32:
        raise InputError(f"priority must be a number from 1, the highest, not {value!r}")
    return value


def timeout_of(value: Any) -> float | None:
    """A timeout in seconds, from microseconds; 0 and None give None. Raises InputError."""
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_TIMEOUT_US:
        raise InputError(f"timeout must be a number of microseconds, not {value!r}")
    return value / 1e6


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


def from_bytes(data: memoryview | bytes, spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    """An array that shares the memory of little-endian `data`. Raises InputError if the number of bytes does not fit `shape`."""
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    wanted = elements(shape, spec.name) * dtype.itemsize
    if len(data) != wanted:
        raise InputError(f"{spec.name!r} has {len(data)} bytes of data; its shape takes {wanted}")
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    if spec.dtype == "bool" and array.view(np.uint8).max(initial=0) > 1:
        raise InputError(f"{spec.name!r} is BOOL: its bytes must be 0 or 1")
    return array.astype(spec.dtype, copy=False)


def check_datatype(datatype: Any, spec: TensorSpec) -> None:
    """Raise InputError unless `datatype` is the input's datatype in the protocol."""
    expected = DATATYPES[spec.dtype]
    if datatype != expected:
        raise InputError(f"{spec.name!r} has datatype {datatype!r}; expected {expected}")


def _tensor(entry: Json, spec: TensorSpec, rest: memoryview, at: int) -> tuple[np.ndarray, int]:
    """The array of the input `entry`, and where the binary data of the next input begin in `rest`; its own begin `at`."""
    check_datatype(entry.get("datatype"), spec)
    shape = entry.get("shape")
    if not isinstance(shape, list) or any(isinstance(size, bool) or not isinstance(size, int) for size in shape):
        raise InputError(f"the shape of {spec.name!r} must be a list of numbers")
    count = elements(shape, spec.name)
    # Checked before the data are read: a wrong shape must not make the server allocate memory for it.
    spec.check(spec.dtype, shape, {})
    size = _parameters(entry, f"input {spec.name!r}").get("binary_data_size")
    if size is not None:
        if "data" in entry:
            raise InputError(f"{spec.name!r} has both data and binary_data_size")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest) - at:
            raise InputError(f"binary_data_size of {spec.name!r} is {size!r}; {len(rest) - at} bytes are left of the body")
        return from_bytes(rest[at : at + size], spec, shape), at + size
    if "data" not in entry:
        raise InputError(f"{spec.name!r} has neither data nor binary_data_size")
    return _from_json(entry["data"], spec, shape, count), at


def _from_json(data: Any, spec: TensorSpec, shape: Sequence[int], count: int) -> np.ndarray:
    if not isinstance(data, list):
        raise InputError(f"the data of {spec.name!r} must be a list")
    target = np.dtype(spec.dtype)
    try:
        array = _floats(data) if target.kind == "f" else None
        if array is None:
            array = np.array(data)
    except (ValueError, OverflowError):
        raise InputError(f"the data of {spec.name!r} is ragged or not of numbers") from None
    if array.size != count or (array.ndim > 1 and array.shape != tuple(shape)):
        raise InputError(f"the data of {spec.name!r} have shape {list(array.shape)}; expected {list(shape)}, or all in one list")
    allowed = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}[target.kind]
    if array.size and array.dtype.kind not in allowed:
        raise InputError(f"the data of {spec.name!r} are not all {DATATYPES[spec.dtype]}")
    if target.kind in "iu" and array.size:
        info = np.iinfo(target)
        if int(array.min()) < info.min or int(array.max()) > info.max:
            raise InputError(f"the data of {spec.name!r} go beyond {DATATYPES[spec.dtype]}")
    with np.errstate(over="ignore"):
        result = array.astype(target).reshape(shape)
    if target.kind == "f" and not np.isfinite(result).all():
        raise InputError(f"the data of {spec.name!r} go beyond {DATATYPES[spec.dtype]}")
    return result


def _floats(data: list[Any]) -> np.ndarray | None:
    """A flat list of numbers as float64; None for any other list. Takes half as long as `numpy.array`, which looks for the type."""
    if not data or isinstance(data[0], bool | list):
        return None
    try:
        return np.frombuffer(array.array("d", data))
    except (TypeError, OverflowError):
        return None


def _asked(document: Json, outputs: Sequence[TensorSpec], *, default: bool) -> tuple[tuple[str, bool], ...]:
    if not document.get("outputs"):
        if not isinstance(document.get("outputs", []), list):
            raise InputError("outputs must be a list")
        return tuple((spec.name, default) for spec in outputs)
    chosen: dict[str, bool] = {}
    for entry in _list(document, "outputs"):
        entry = _object(entry, "an output")
        spec = _named(entry, outputs, "output")
        parameters = _parameters(entry, f"output {spec.name!r}")
        if parameters.get("classification"):
            raise InputError("classification is not supported here: POST an image to /classify")
        if spec.name in chosen:
            raise InputError(f"output {spec.name!r} is asked for twice")
        chosen[spec.name] = _flag(parameters, "binary_data", default)
    return tuple(chosen.items())


def _named(entry: Json, specs: Sequence[TensorSpec], what: str) -> TensorSpec:
    name = entry.get("name")
    for spec in specs:
        if spec.name == name:
            return spec
    raise InputError(f"unknown {what} {name!r}; expected {', '.join(map(str, specs))}")


def _flag(parameters: Json, name: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false")
    return value


def _parameters(entry: Json, what: str) -> Json:
    return _object(entry.get("parameters") or {}, f"parameters of {what}")


def _list(document: Json, key: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise InputError(f"the request needs a list of {key}")
    return value


def _object(value: Any, what: str) -> Json:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a JSON object")
    return value
