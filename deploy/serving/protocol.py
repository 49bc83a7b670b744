"""The tensors of the Open Inference Protocol v2 over REST: JSON, and Triton's binary extension, to numpy arrays and back.

The protocol: KServe, "Open Inference Protocol (V2)". The extensions: Triton Inference Server, "Binary Tensor Data Extension",
"Classification Extension". All that a client sends is checked here before it is used.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.serving.classes import classes_of, pack
from deploy.serving.numbers import LARGE_BYTES, Body, Cut, decode, from_json, from_text, may_have_truth_values, to_json
from deploy.serving.regions import NO_REGIONS, Regions
from deploy.serving.request import (
    DATATYPE_OF,
    InferRequest,
    Wanted,
    bytes_of,
    check_datatype,
    check_options,
    check_outputs,
    elements,
    flag,
    from_bytes,
    id_of,
    place_of_input,
    priority_of,
    timeout_of,
    wanted_output,
)

Json = dict[str, Any]
ReadNumbers = Callable[[Any, TensorSpec, Sequence[int]], np.ndarray]


def parse_request(
    body: Body,
    header_length: int | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    regions: Regions = NO_REGIONS,
) -> InferRequest:
    """Parse a request: the first `header_length` bytes of `body` are JSON (None: all bytes), the rest are binary tensors.

    inputs, outputs: those of the model. Raises InputError, and RefusedError for shared memory where it is off.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise InputError(f"Inference-Header-Content-Length is {header_length}; the body has {len(body)} bytes")
    head = memoryview(body)[:header_length]
    rest = memoryview(body)[len(head) :]
    document, read = _read(body, head)
    document = _object(document, "the request")
    parameters = _parameters(document, "the request")
    check_options(parameters)
    feed: dict[str, np.ndarray] = {}
    at = 0
    for entry in _list(document, "inputs"):
        entry = _object(entry, "an input")
        spec = _named(entry, inputs, "input")
        if spec.name in feed:
            raise InputError(f"input {spec.name!r} is given twice")
        feed[spec.name], at = _tensor(entry, spec, rest, at, read, regions)
    if at != len(rest):
        raise InputError(f"the inputs take {at} bytes of binary data; the body has {len(rest)}")
    if missing := [str(spec) for spec in inputs if spec.name not in feed]:
        raise InputError(f"missing {', '.join(missing)}")
    return InferRequest(
        id=id_of(document.get("id", "")),
        feed=feed,
        outputs=_asked(document, outputs, regions, binary=flag(parameters, "binary_data_output")),
        priority=priority_of(parameters.get("priority")),
        timeout_s=timeout_of(parameters.get("timeout")),
    )


def _read(body: Body, head: memoryview) -> tuple[Any, ReadNumbers]:
    """The decoded document, and what makes an array of the `data` in it."""
    if len(head) <= LARGE_BYTES:
        return decode(head), partial(from_json, truth_values=may_have_truth_values(body, len(head)))
    cut = Cut(body, len(head))

    def read(data: Any, spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
        text = cut.arrays.get(data) if isinstance(data, str) else None
        return from_json(data, spec, shape) if text is None else from_text(text, spec, shape)

    return cut.document, read


def build_response(
    name: str,
    version: str,
    request: InferRequest,
    results: Mapping[str, np.ndarray],
    *,
    regions: Regions = NO_REGIONS,
    classes: Sequence[str] | None = None,
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON if binary tensors follow, else None. In JSON, NaN and infinities are null.

    classes: the names of the model's classes. Raises InputError for an output that does not fit its place in shared memory.
    """
    entries = []
    binary: list[Any] = []
    for output in request.outputs:
        array = results[output.name]
        if output.classes:
            array = classes_of(array, output.classes, classes)
        entry: Json = {"name": output.name, "datatype": DATATYPE_OF.get(array.dtype, "BYTES"), "shape": list(array.shape)}
        if output.place is not None:
            regions.write(output.place, array)
            entry["parameters"] = {
                "shared_memory_region": output.place.region,
                "shared_memory_offset": output.place.offset,
                "shared_memory_byte_size": array.nbytes,
            }
        elif output.binary:
            data = pack(array) if output.classes else bytes_of(array)
            entry["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        elif output.classes:
            entry["data"] = [text.decode() for text in array.reshape(-1).tolist()]
        else:
            entry["data"] = to_json(array)
        entries.append(entry)
    document: Json = {"model_name": name, "model_version": version, "outputs": entries}
    if request.id:
        document["id"] = request.id
    head = msgspec.json.encode(document)
    return (b"".join((head, *binary)), len(head)) if binary else (head, None)


def _tensor(
    entry: Json, spec: TensorSpec, rest: memoryview, at: int, read: ReadNumbers, regions: Regions
) -> tuple[np.ndarray, int]:
    """The array of the input `entry`, and where the binary data of the next input begin in `rest`; its own begin `at`."""
    check_datatype(entry.get("datatype"), spec)
    shape = entry.get("shape")
    if not isinstance(shape, list) or any(isinstance(size, bool) or not isinstance(size, int) for size in shape):
        raise InputError(f"the shape of {spec.name!r} must be a list of numbers")
    elements(shape, spec.name)
    # Checked before the data are read: a wrong shape must not make the server allocate memory for it.
    spec.check(spec.dtype, shape, {})
    options = _parameters(entry, f"input {spec.name!r}")
    place = place_of_input(options, spec.name)
    size = options.get("binary_data_size")
    if ("data" in entry) + (size is not None) + (place is not None) != 1:
        raise InputError(f"{spec.name!r} must have one of data, binary_data_size and shared_memory_region")
    if place is not None:
        return regions.read(place, spec, shape), at
    if size is None:
        return read(entry["data"], spec, shape), at
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest) - at:
        raise InputError(f"binary_data_size of {spec.name!r} is {size!r}; {len(rest) - at} bytes are left of the body")
    return from_bytes(rest[at : at + size], spec, shape), at + size


def _asked(document: Json, outputs: Sequence[TensorSpec], regions: Regions, *, binary: bool) -> tuple[Wanted, ...]:
    if not document.get("outputs"):
        if not isinstance(document.get("outputs", []), list):
            raise InputError("outputs must be a list")
        return tuple(Wanted(name=spec.name, binary=binary) for spec in outputs)
    chosen = []
    for entry in _list(document, "outputs"):
        entry = _object(entry, "an output")
        name = _named(entry, outputs, "output").name
        wanted = wanted_output(name, _parameters(entry, f"output {name!r}"), binary=binary)
        if wanted.place is not None:
            regions.check(wanted.place)
        chosen.append(wanted)
    return check_outputs(chosen)


def _named(entry: Json, specs: Sequence[TensorSpec], what: str) -> TensorSpec:
    name = entry.get("name")
    for spec in specs:
        if spec.name == name:
            return spec
    raise InputError(f"unknown {what} {name!r}; expected {', '.join(map(str, specs))}")


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
