"""The messages of the gRPC door: the protocol's descriptors, and inference requests and answers to and from numpy arrays.

The descriptors are in a pool of their own: many packages register a protocol buffer package `inference` in the default pool, and the
second to do so in a process fails.
"""

import functools
from importlib import resources
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.serving.models import Served
from deploy.serving.protocol import DATATYPES, InferRequest, check_datatype, elements, from_bytes, priority_of, timeout_of

_CONTENTS = {
    "bool": "bool_contents", "int8": "int_contents", "int16": "int_contents", "int32": "int_contents", "int64": "int64_contents",
    "uint8": "uint_contents", "uint16": "uint_contents", "uint32": "uint_contents", "uint64": "uint64_contents",
    "float32": "fp32_contents", "float64": "fp64_contents",
}  # fmt: skip

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


def parse_request(request: Any, served: Served) -> InferRequest:
    """The inference request in a `ModelInferRequest`. Raises InputError."""
    specs = {spec.name: spec for spec in served.inputs}
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs")
    feed: dict[str, np.ndarray] = {}
    for index, tensor in enumerate(request.inputs):
        spec = specs.get(tensor.name)
        if spec is None:
            raise InputError(f"unknown input {tensor.name!r}; expected {', '.join(map(str, served.inputs))}")
        if spec.name in feed:
            raise InputError(f"input {spec.name!r} is given twice")
        if raw and tensor.HasField("contents"):
            raise InputError(f"{spec.name!r} has both contents and raw_input_contents")
        check_datatype(tensor.datatype, spec)
        shape = list(tensor.shape)
        elements(shape, spec.name)
        spec.check(spec.dtype, shape, {})
        feed[spec.name] = from_bytes(raw[index], spec, shape) if raw else _from_contents(tensor.contents, spec, shape)
    if missing := [str(spec) for spec in served.inputs if spec.name not in feed]:
        raise InputError(f"missing {', '.join(missing)}")
    known = [spec.name for spec in served.outputs]
    asked = [output.name for output in request.outputs] or known
    for name in asked:
        if name not in known:
            raise InputError(f"unknown output {name!r}; expected {', '.join(map(str, served.outputs))}")
    if len(set(asked)) < len(asked):
        raise InputError("an output is asked for twice")
    parameters = {key: _value(value) for key, value in request.parameters.items()}
    return InferRequest(
        id=request.id,
        feed=feed,
        outputs=tuple((name, bool(raw)) for name in asked),
        priority=priority_of(parameters.get("priority")),
        timeout_s=timeout_of(parameters.get("timeout")),
    )


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
    array = np.array(values)
    target = np.dtype(spec.dtype)
    if target.kind in "iu" and array.size:
        info = np.iinfo(target)
        if int(array.min()) < info.min or int(array.max()) > info.max:
            raise InputError(f"the data of {spec.name!r} go beyond {DATATYPES[spec.dtype]}")
    return array.astype(target).reshape(shape)


def build_response(served: Served, request: InferRequest, results: dict[str, np.ndarray]) -> Any:
    arrays = [np.ascontiguousarray(results[name]) for name, _ in request.outputs]
    raw = any(is_raw for _, is_raw in request.outputs) or any(str(array.dtype) not in _CONTENTS for array in arrays)
    answer = message("inference.ModelInferResponse")(
        model_name=served.source.name, model_version=served.source.version, id=request.id
    )
    for (name, _), array in zip(request.outputs, arrays, strict=True):
        tensor = answer.outputs.add(name=name, datatype=DATATYPES[str(array.dtype)], shape=array.shape)
        if raw:
            answer.raw_output_contents.append(array.tobytes())
        else:
            getattr(tensor.contents, _CONTENTS[str(array.dtype)]).extend(array.reshape(-1).tolist())
    return answer
