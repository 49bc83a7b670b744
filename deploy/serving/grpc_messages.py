"""The messages of the gRPC door, from the protocol's descriptors.

The descriptors are in a pool of their own: many packages register a protocol buffer package `inference` in the default pool, and the
second to do so in a process fails.
"""

import functools
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from deploy.errors import InputError

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
