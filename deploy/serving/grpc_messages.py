"""The messages of the gRPC door: the protocol's descriptors, and inference requests and answers to and from numpy arrays.

The descriptors are in a pool of their own: many packages register a protocol buffer package `inference` in the default pool, and the
second to do so in a process fails.
"""

import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.serving.classes import classes_of, pack
from deploy.serving.models import Served
from deploy.serving.regions import NO_REGIONS, Regions
from deploy.serving.request import (
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

POOL = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(
    resources.files("deploy.serving").joinpath("protocols.binpb").read_bytes()
).file:
    POOL.AddSerializedFile(_file.SerializeToString())


@functools.cache
def message(name: str) -> Any:
    """The class of a message, such as `inference.ModelInferRequest`."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


def read_message(kind: Any, data: bytes) -> Any:
    """Parse a message of the class `kind`. Raises InputError."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InputError(f"the request is no {kind.DESCRIPTOR.name}: {error}") from None


def parse_request(request: Any, served: Served, regions: Regions = NO_REGIONS) -> InferRequest:
    """The inference request in a `ModelInferRequest`. Raises InputError, and RefusedError for shared memory where it is off."""
    specs = {spec.name: spec for spec in served.inputs}
    options = _options(request)
    check_options(options)
    places = [place_of_input(_options(tensor), tensor.name) for tensor in request.inputs]
    raw = request.raw_input_contents
    sent = sum(place is None for place in places)
    if raw and len(raw) != sent:
        raise InputError(f"{len(raw)} raw_input_contents for {sent} inputs")
    each_raw = iter(raw)
    feed: dict[str, np.ndarray] = {}
    for tensor, place in zip(request.inputs, places, strict=True):
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
        else:
            feed[spec.name] = from_bytes(next(each_raw), spec, shape) if raw else _from_contents(tensor.contents, spec, shape)
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


def _from_contents(contents: Any, spec: TensorSpec, shape: list[int]) -> np.ndarray:
    field = _CONTENTS.get(spec.dtype)
    if field is None:
        raise InputError(f"{spec.name!r} is {DATATYPES[spec.dtype]}, which has no contents: send raw_input_contents")
    filled = [descriptor.name for descriptor, _ in contents.ListFields()]
    if any(name != field for name in filled):
        raise InputError(f"{spec.name!r} is {DATATYPES[spec.dtype]}: its data belong into {field}, not {', '.join(filled)}")
    values = getattr(contents, field)
    wanted = elements(shape, spec.name)
    if len(values) != wanted:
        raise InputError(f"{spec.name!r} has {len(values)} values; its shape takes {wanted}")
    target = np.dtype(spec.dtype)
    # As wide as the field: numpy itself would make floats of large and small unsigned numbers.
    array = np.fromiter(values, dtype=_WIDTHS.get(field, target), count=wanted)
    if target.kind in "iu" and array.size:
        info = np.iinfo(target)
        if int(array.min()) < info.min or int(array.max()) > info.max:
            raise InputError(f"the data of {spec.name!r} go beyond {DATATYPES[spec.dtype]}")
    return array.astype(target).reshape(shape)


def build_response(
    served: Served, request: InferRequest, results: Mapping[str, np.ndarray], regions: Regions = NO_REGIONS
) -> Any:
    """The `ModelInferResponse`. Raises InputError for an output that does not fit its place in shared memory."""
    made = [(output, np.ascontiguousarray(results[output.name])) for output in request.outputs]
    raw = any(output.binary or output.classes or str(array.dtype) not in _CONTENTS for output, array in made)
    answer = message("inference.ModelInferResponse")(
        model_name=served.source.name, model_version=served.source.version, id=request.id
    )
    for output, array in made:
        if output.classes:
            array = classes_of(array, output.classes, served.artifact.manifest.classes)
        tensor = answer.outputs.add(name=output.name, datatype=DATATYPES.get(str(array.dtype), "BYTES"), shape=array.shape)
        if output.place is not None:
            regions.write(output.place, array)
            tensor.parameters["shared_memory_region"].string_param = output.place.region
            tensor.parameters["shared_memory_offset"].int64_param = output.place.offset
            tensor.parameters["shared_memory_byte_size"].int64_param = array.nbytes
        if raw:  # one for each output, whatever it is
            answer.raw_output_contents.append(_raw(output, array))
        elif output.place is None:
            getattr(tensor.contents, _CONTENTS[str(array.dtype)]).extend(array.reshape(-1).tolist())
    return answer


def _raw(output: Wanted, array: np.ndarray) -> bytes:
    if output.place is not None:
        return b""
    return pack(array) if output.classes else array.tobytes()
