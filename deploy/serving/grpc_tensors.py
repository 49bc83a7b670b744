"""Inference requests and answers over gRPC, to and from numpy arrays."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.serving.classes import classes_of, pack
from deploy.serving.grpc_large import Pieces, Received, from_pieces, misfit
from deploy.serving.models import Served
from deploy.serving.numbers import LARGE_ELEMENTS, PIECE_ELEMENTS, YIELD_S
from deploy.serving.regions import NO_REGIONS, Regions
from deploy.serving.request import (
    DATATYPE_OF,
    DATATYPES,
    InferRequest,
    Wanted,
    check_datatype,
    check_options,
    check_outputs,
    elements,
    from_bytes,
    place_of_input,
    priority_of,
    timeout_of,
    wanted_output,
)

_CONTENTS = {
    "bool": "bool_contents", "int8": "int_contents", "int16": "int_contents", "int32": "int_contents", "int64": "int64_contents",
    "uint8": "uint_contents", "uint16": "uint_contents", "uint32": "uint_contents", "uint64": "uint64_contents",
    "float32": "fp32_contents", "float64": "fp64_contents",
}  # fmt: skip

_WIDTHS = {"int_contents": np.int32, "uint_contents": np.uint32}
"""Fields that hold smaller numbers too."""


def parse_request(received: Received, served: Served, regions: Regions = NO_REGIONS) -> InferRequest:
    """The inference request in a `ModelInferRequest`. Raises InputError, and RefusedError for shared memory where it is off."""
    request = received.message
    specs = {spec.name: spec for spec in served.inputs}
    options = _options(request)
    check_options(options)
    places = [place_of_input(_options(tensor), tensor.name) for tensor in request.inputs]
    raw = request.raw_input_contents
    sent = sum(place is None for place in places)
    if raw and len(raw) != sent:
        raise InputError(f"{len(raw)} raw_input_contents for {sent} inputs")
    each_raw = (received.raw.get(index, part) for index, part in enumerate(raw))
    feed: dict[str, np.ndarray] = {}
    for index, (tensor, place) in enumerate(zip(request.inputs, places, strict=True)):
        spec = specs.get(tensor.name)
        if spec is None:
            raise InputError(f"unknown input {tensor.name!r}; expected {', '.join(map(str, served.inputs))}")
        if spec.name in feed:
            raise InputError(f"input {spec.name!r} is given twice")
        if tensor.HasField("contents") and (raw or place is not None):
            raise InputError(f"{spec.name!r} has contents, and raw_input_contents or a place in shared memory")
        check_datatype(tensor.datatype, spec)
        shape = list(tensor.shape)
        elements(shape, spec.name)
        spec.check(spec.dtype, shape, {})
        if place is not None:
            feed[spec.name] = regions.read(place, spec, shape)
        elif raw:
            feed[spec.name] = from_bytes(next(each_raw), spec, shape)
        else:
            feed[spec.name] = _from_contents(tensor.contents, received.contents.get(index, {}), spec, shape)
    if missing := [str(spec) for spec in served.inputs if spec.name not in feed]:
        raise InputError(f"missing {', '.join(missing)}")
    return InferRequest(
        id=request.id,
        feed=feed,
        outputs=_asked(request, served, regions, binary=bool(raw) or not sent),
        priority=priority_of(options.get("priority")),
        timeout_s=timeout_of(options.get("timeout")),
    )


def _asked(request: Any, served: Served, regions: Regions, *, binary: bool) -> tuple[Wanted, ...]:
    known = [spec.name for spec in served.outputs]
    if not request.outputs:
        return tuple(Wanted(name=name, binary=binary) for name in known)
    chosen = []
    for output in request.outputs:
        if output.name not in known:
            raise InputError(f"unknown output {output.name!r}; expected {', '.join(map(str, served.outputs))}")
        wanted = wanted_output(output.name, _options(output), binary=binary)
        if wanted.place is not None:
            regions.check(wanted.place)
        chosen.append(wanted)
    return check_outputs(chosen)


def _options(part: Any) -> dict[str, Any]:
    """The parameters of a request, an input or an output."""
    return {name: _value(value) for name, value in part.parameters.items()}


def _value(parameter: Any) -> Any:
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


def _from_contents(contents: Any, pieces: Pieces, spec: TensorSpec, shape: list[int]) -> np.ndarray:
    field = _CONTENTS.get(spec.dtype)
    if field is None:
        raise InputError(f"{spec.name!r} is {DATATYPES[spec.dtype]}, which has no contents: send raw_input_contents")
    filled = [descriptor.name for descriptor, _ in contents.ListFields()]
    if any(name != field for name in (*filled, *pieces)):
        listed = ", ".join(dict.fromkeys((*filled, *pieces)))
        raise InputError(f"{spec.name!r} is {DATATYPES[spec.dtype]}: its data belong into {field}, not {listed}")
    if filled and pieces:
        raise InputError(f"{field} of {spec.name!r} comes in parts, which is not taken: send it in one")
    target = np.dtype(spec.dtype)
    # As wide as the field: numpy itself would make floats of large and small unsigned numbers.
    wide = np.dtype(_WIDTHS.get(field, target))
    if pieces:
        array = from_pieces(field, pieces[field], spec, wide, shape)
    else:
        values = getattr(contents, field)
        if len(values) != (wanted := elements(shape, spec.name)):
            raise misfit(spec, len(values), wanted)
        array = np.fromiter(values, dtype=wide, count=wanted)
    if target.kind in "iu" and array.size:
        info = np.iinfo(target)
        if int(array.min()) < info.min or int(array.max()) > info.max:
            raise InputError(f"the data of {spec.name!r} go beyond {DATATYPES[spec.dtype]}")
    return array.astype(target, copy=False).reshape(shape)


def fill_response(
    answer: Any, served: Served, request: InferRequest, results: Mapping[str, np.ndarray], regions: Regions = NO_REGIONS
) -> None:
    """Fill `answer`, an empty `ModelInferResponse`. Raises InputError for an output that does not fit its place in shared memory."""
    made = [(output, np.ascontiguousarray(results[output.name])) for output in request.outputs]
    raw = any(output.binary or output.classes or str(array.dtype) not in _CONTENTS for output, array in made)
    answer.model_name, answer.model_version, answer.id = served.source.name, served.source.version, request.id
    for output, array in made:
        if output.classes:
            array = classes_of(array, output.classes, served.artifact.manifest.classes)
        tensor = answer.outputs.add(name=output.name, datatype=DATATYPE_OF.get(array.dtype, "BYTES"), shape=array.shape)
        if output.place is not None:
            regions.write(output.place, array)
            tensor.parameters["shared_memory_region"].string_param = output.place.region
            tensor.parameters["shared_memory_offset"].int64_param = output.place.offset
            tensor.parameters["shared_memory_byte_size"].int64_param = array.nbytes
        if raw:  # one for each output, whatever it is
            answer.raw_output_contents.append(_raw(output, array))
        elif output.place is None:
            _fill(getattr(tensor.contents, _CONTENTS[str(array.dtype)]), array.reshape(-1))


def _fill(field: Any, values: np.ndarray) -> None:
    """Add numbers to a field of contents; many of them in pieces, between which other threads have the interpreter."""
    if values.size <= LARGE_ELEMENTS:
        field.extend(values.tolist())
        return
    for start in range(0, values.size, PIECE_ELEMENTS):
        field.extend(values[start : start + PIECE_ELEMENTS].tolist())
        time.sleep(YIELD_S)


def _raw(output: Wanted, array: np.ndarray) -> bytes:
    if output.place is not None:
        return b""
    return pack(array) if output.classes else array.tobytes()
