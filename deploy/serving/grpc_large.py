"""Large inference requests over gRPC: taken apart beside the event loop, without a long hold of the interpreter.

Protobuf reads a message, and all the numbers in it, in one call that lets no other thread run. So the tensors are cut out of a large
request first, by the lengths that stand before them, and are views of its bytes; protobuf reads what is left of it, and the numbers
that are not in binary piece by piece. The encoding: Protocol Buffers, "Encoding", https://protobuf.dev/programming-guides/encoding.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.serving.grpc_messages import message, read_message
from deploy.serving.numbers import YIELD_S
from deploy.serving.request import elements, from_bytes

LARGE_BYTES = 1 << 18
"""A request larger than this is taken apart off the event loop."""

_CUT_BYTES = 1 << 12
_PIECE_BYTES = 1 << 14
_LONGEST_NUMBER = 10  # bytes of one that takes as many as its size asks for

_REQUEST = message("inference.ModelInferRequest")
_TENSOR = message("inference.ModelInferRequest.InferInputTensor")
_CONTENTS = message("inference.InferTensorContents")
_INPUTS = _REQUEST.DESCRIPTOR.fields_by_name["inputs"].number
_RAW = _REQUEST.DESCRIPTOR.fields_by_name["raw_input_contents"].number
_IN_TENSOR = _TENSOR.DESCRIPTOR.fields_by_name["contents"].number
_NAMES = {each.number: each.name for each in _CONTENTS.DESCRIPTOR.fields if each.name != "bytes_contents"}
_SIZES = {0: None, 1: 8, 2: None, 5: 4}
"""Bytes of a value by its kind; None where the value says."""

Pieces = dict[str, list[memoryview]]
"""Bytes of the numbers of a tensor, by the field of its contents that they belong to."""


@dataclass(frozen=True)
class Received:
    """A `ModelInferRequest`, and what was cut out of it, by the index in `raw_input_contents` and in `inputs`.

    began: when it began to be read, on the performance counter.
    """

    message: Any
    began: float
    raw: Mapping[int, memoryview] = field(default_factory=dict)
    contents: Mapping[int, Pieces] = field(default_factory=dict)


async def read_request(data: bytes) -> Received:
    """Parse a `ModelInferRequest`. Raises InputError."""
    if len(data) <= LARGE_BYTES:
        began = time.perf_counter()
        return Received(read_message(_REQUEST, data), began)
    return await asyncio.to_thread(cut, data)


def cut(data: bytes) -> Received:
    """Take a request apart. Raises InputError if it is none, or if more than `LARGE_BYTES` are left of it: small parts can be many."""
    began = time.perf_counter()
    raw: dict[int, memoryview] = {}
    contents: dict[int, Pieces] = {}
    raws = inputs = 0
    rest = _Rest(memoryview(data), LARGE_BYTES)
    for number, begin, start, end in rest.fields(0, len(data)):
        if number == _RAW:
            if end - start >= _CUT_BYTES:
                raw[raws] = rest.take(begin, start, end)
            raws += 1
        elif number == _INPUTS:
            if end - start >= _CUT_BYTES:
                pieces: Pieces = {}
                rest.replace(begin, end, _tagged(_INPUTS, _without(rest, start, end, pieces)))
                if pieces:
                    contents[inputs] = pieces
            inputs += 1
    return Received(read_message(_REQUEST, rest.joined()), began, raw, contents)


def _without(rest: "_Rest", start: int, end: int, pieces: Pieces) -> bytes:
    """An input without the numbers in its contents, which go into `pieces`."""
    tensor = rest.part()
    for number, begin, inner, stop in tensor.fields(start, end):
        if number == _IN_TENSOR and stop - inner >= _CUT_BYTES:
            kept = tensor.part()
            for kind, first, values, last in kept.fields(inner, stop):
                if kind in _NAMES and last - values >= _CUT_BYTES:
                    pieces.setdefault(_NAMES[kind], []).append(kept.view[values:last])
                    kept.replace(first, last, b"")
            tensor.replace(begin, stop, _tagged(_IN_TENSOR, kept.joined()))
    return tensor.joined()


class _Rest:
    """A message from which fields are taken. Raises InputError once more than `most` bytes of it, and of its parts, are kept."""

    def __init__(self, view: memoryview, most: int, kept: list[int] | None = None) -> None:
        self.view = view
        self._most = most
        self._kept = [0] if kept is None else kept
        self._parts: list[bytes | memoryview] = []
        self._done = self._stop = 0

    def part(self) -> "_Rest":
        """Of a field in it, with the same bound."""
        return _Rest(self.view, self._most, self._kept)

    def fields(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """The number of each field between `start` and `stop`, where it begins, and where its value begins and ends.

        The number is 0 for one that has no length.
        """
        self._done, self._stop = start, stop
        at = start
        while at < stop:
            tag, value = self._number(at, stop)
            if tag & 7 not in _SIZES or not tag >> 3:
                raise _no_request()
            size = _SIZES[tag & 7]
            if size is None:
                size, value = self._number(value, stop) if tag & 7 else (self._number(value, stop)[1] - value, value)
            end = value + size
            if end > stop:
                raise _no_request()
            yield (tag >> 3 if tag & 7 == 2 else 0), at, value, end
            if self._done <= at:  # it was not taken
                self._keep(end - at)
            at = end

    def take(self, begin: int, start: int, end: int) -> memoryview:
        """The value of a field, which is left empty."""
        tag, _ = self._number(begin, end)
        self.replace(begin, end, _varint(tag) + b"\0")
        return self.view[start:end]

    def replace(self, begin: int, end: int, by: bytes) -> None:
        """Put other bytes in the place of a field."""
        self._keep(len(by) + 1)
        self._parts += (self.view[self._done : begin], by)
        self._done = end

    def joined(self) -> bytes:
        return b"".join((*self._parts, self.view[self._done : self._stop]))

    def _keep(self, size: int) -> None:
        self._kept[0] += size
        if self._kept[0] > self._most:
            raise InputError(
                f"more than {self._most} bytes of the request are not tensors of some size: send raw_input_contents, or packed contents"
            )

    def _number(self, at: int, stop: int) -> tuple[int, int]:
        """A number of variable length, and where it ends."""
        value = shift = 0
        for end in range(at, min(at + _LONGEST_NUMBER, stop)):
            byte = self.view[end]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, end + 1
            shift += 7
        raise _no_request()


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*made, value))


def _tagged(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _no_request() -> InputError:
    return InputError("the request is no ModelInferRequest: it is damaged, or cut off")


def from_pieces(name: str, pieces: Sequence[memoryview], spec: TensorSpec, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """The numbers of the field `name` of a tensor's contents, (elements,) of `dtype`, exact. Raises InputError for another count.

    dtype: of the field's numbers.
    """
    if name in ("fp32_contents", "fp64_contents"):
        return from_bytes(pieces[0] if len(pieces) == 1 else b"".join(pieces), spec, shape).reshape(-1)
    wanted = elements(shape, spec.name)
    if wanted > sum(map(len, pieces)):  # each takes a byte
        raise InputError(f"{spec.name!r} has fewer values than the {wanted} that its shape takes")
    result = np.empty(wanted, dtype=dtype)
    filled = 0
    number = _CONTENTS.DESCRIPTOR.fields_by_name[name].number
    for piece in pieces:
        at = 0
        while at < len(piece):
            end = _end_of_number(piece, min(at + _PIECE_BYTES, len(piece)))
            values = getattr(read_message(_CONTENTS, _tagged(number, bytes(piece[at:end]))), name)
            if filled + len(values) > wanted:
                raise misfit(spec, filled + len(values), wanted)
            result[filled : filled + len(values)] = np.fromiter(values, dtype=dtype, count=len(values))
            filled, at = filled + len(values), end
            time.sleep(YIELD_S)
    if filled != wanted:
        raise misfit(spec, filled, wanted)
    return result


def _end_of_number(piece: memoryview, end: int) -> int:
    """The last place up to `end` where a number ends."""
    for at in range(end, max(end - _LONGEST_NUMBER, 0), -1):
        if piece[at - 1] < 0x80:
            return at
    raise _no_request()


def misfit(spec: TensorSpec, count: int, wanted: int) -> InputError:
    """The error for another number of values than the shape takes."""
    return InputError(f"{spec.name!r} has {count} values; its shape takes {wanted}")
