"""JSON numbers to numpy arrays and back: to the last digit, NaN and infinities too, and large ones in pieces.

A decoder of JSON keeps the interpreter until it is done. So a body of many megabytes is read in pieces by a thread that lets others
have the interpreter between two of them.
"""

import array
import itertools
import json
import math
import mmap
import os
import re
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.serving.request import DATATYPES

LARGE_BYTES = 1 << 18
"""JSON larger than this is read in pieces, off the event loop."""

REST_BYTES = 1 << 20
"""How much of large JSON may be something else than lists of numbers."""

LARGE_ELEMENTS = 1 << 16
"""A tensor with more elements than this is written in pieces, off the event loop."""

PIECE_ELEMENTS = 1 << 13
"""How many numbers are read or written without letting other threads have the interpreter, and for how many seconds they have it."""

YIELD_S = 1e-4
_PIECE_BYTES = 1 << 16
_NOT_FINITE = re.compile(rb"NaN|Infinity")
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BRACKETS_AS_SPACES = bytes.maketrans(b"[]", b"  ")
_NO_BRACKETS_OR_COMMAS = bytes(byte for byte in range(256) if byte not in b"[],")

Bytes = bytes | bytearray | memoryview

Body = bytes | bytearray | mmap.mmap
"""The body of a request."""


def decode(text: Bytes) -> Any:
    """The value of JSON text, in which NaN, Infinity and -Infinity are numbers, as Python's `json` writes them. Raises InputError."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if not isinstance(error, RecursionError) and _NOT_FINITE.search(text):
            try:
                return json.loads(bytes(text).decode(), parse_float=_finite)
            except (ValueError, RecursionError):
                pass
        raise InputError(f"the request is no JSON: {error}") from None


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is out of range")
    return value


def may_have_truth_values(text: Body, end: int) -> bool:
    """Whether true or false may stand in the data among the first `end` bytes of JSON text: whether a letter of theirs does.

    That is quick, and mostly enough: clients send the data last, and no number has these letters.
    """
    at = max(text.find(b'"data"', 0, end), 0) + len(b'"data"')
    return text.find(b"t", at, end) >= 0 or text.find(b"f", at, end) >= 0 or text.find(b"\\", 0, end) >= 0  # a key may be escaped


def from_json(data: Any, spec: TensorSpec, shape: Sequence[int], *, truth_values: bool = True) -> np.ndarray:
    """The array of decoded JSON: nested lists of this shape, or all numbers in one list. Raises InputError.

    truth_values: whether there may be any, which are no numbers; without, types are not looked at one by one.
    """
    if not isinstance(data, list):
        raise InputError(f"the data of {spec.name!r} must be a list")
    if not data or type(data[0]) is not list:
        shape_fits = len(data) == math.prod(shape)
    else:
        shape_fits = len(shape) > 0 and len(data) == shape[0]
        for size in shape[1:]:
            shape_fits = shape_fits and all(type(row) is list and len(row) == size for row in data)
            data = list(itertools.chain.from_iterable(data)) if shape_fits else data
    if not shape_fits:
        raise _misfit(spec, shape)
    return _typed(data, spec, truth_values).reshape(shape)


def _misfit(spec: TensorSpec, shape: Sequence[int]) -> InputError:
    return InputError(
        f"the data of {spec.name!r} do not fit its shape: expected nested lists of {list(shape)}, or all in one list"
    )


def _typed(values: list[Any], spec: TensorSpec, truth_values: bool) -> np.ndarray:
    """A flat list as an array of the input's dtype. Raises InputError unless every value is exactly one of it, or rounds to one."""
    target = np.dtype(spec.dtype)
    if target.kind == "f":
        if truth_values and not set(map(type, values)) <= {int, float}:
            values = [_float(value, spec) for value in values]
        try:
            with np.errstate(over="raise"):
                return np.frombuffer(_doubles(values, spec)).astype(target)
        except (OverflowError, FloatingPointError):
            raise _beyond(spec) from None
    kinds = set(map(type, values))
    if not kinds <= ({bool} if target.kind == "b" else {int}):
        raise _no_such(spec)
    if target.kind == "b":
        return np.array(values, dtype=bool)
    try:
        # An array that numpy makes of both large and small numbers would be one of floats.
        exact = np.frombuffer(code := array.array("Q" if target.kind == "u" else "q", values), dtype=code.typecode)
    except OverflowError:
        raise _beyond(spec) from None
    info = np.iinfo(target)
    if exact.size and (exact.min() < info.min or exact.max() > info.max):
        raise _beyond(spec)
    return exact.astype(target)


def _doubles(values: list[Any], spec: TensorSpec) -> bytes:
    """The numbers as float64. Raises InputError for what is none, and OverflowError for integers beyond it."""
    form = f"{len(values)}d"
    try:
        return struct.pack(form, *values)
    except struct.error:
        values = [_float(value, spec) for value in values]
    try:
        return struct.pack(form, *values)
    except struct.error as error:
        raise OverflowError from error


def _float(value: Any, spec: TensorSpec) -> float:
    """null is NaN, as this server answers it; "NaN" and so on are as protocol buffers write them in JSON."""
    if value is None:
        return math.nan
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]
    if type(value) is str and value in _WORDS:
        return _WORDS[value]
    raise _no_such(spec)


def _no_such(spec: TensorSpec) -> InputError:
    return InputError(f"the data of {spec.name!r} are not all {DATATYPES[spec.dtype]}")


def _beyond(spec: TensorSpec) -> InputError:
    return InputError(f"the data of {spec.name!r} go beyond {DATATYPES[spec.dtype]}")


class Cut:
    """A large JSON document, without its arrays of numbers.

    document: decoded, with a string of `arrays` in place of each list under a key `data`. Raises InputError if more than
    `REST_BYTES` are left of it: numbers alone can be many.
    """

    def __init__(self, body: Body, end: int) -> None:
        self.arrays: dict[str, memoryview] = {}
        mark = os.urandom(16).hex()
        parts: list[Bytes] = []
        view = memoryview(body)
        at = done = 0
        while (at := body.find(b'"data"', at, end)) >= 0:
            opened = re.compile(rb'"data"\s{0,64}:\s{0,64}(?=\[)').match(body, at, end)
            at += len(b'"data"')
            if opened is None:
                continue
            # No number has either, so the list of numbers ends before.
            stop = min(where for where in (body.find(b'"', at, end), body.find(b"}", at, end), end) if where >= 0)
            close = body.rfind(b"]", opened.end(), stop) + 1
            if close:
                name = f"{mark} {len(self.arrays)}"
                self.arrays[name] = view[opened.end() : close]
                parts += [view[done : opened.end()], f'"{name}"'.encode()]
                at = done = close
        parts.append(view[done:end])
        if sum(map(len, parts)) > REST_BYTES:
            raise InputError(
                f"more than {REST_BYTES} bytes of the JSON are not lists of numbers under the key data: send binary tensors"
            )
        self.document = decode(b"".join(parts))


def from_text(text: memoryview, spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    """The array of JSON text, as `from_json` takes it, read in pieces. Raises InputError."""
    if len(text) <= _PIECE_BYTES:
        return from_json(decode(text), spec, shape)
    count = math.prod(shape)
    nested = bytes(text[:256])[1:].lstrip()[:1] == b"["
    if max((count, *itertools.accumulate(shape, lambda a, b: a * b))) > len(text):  # each takes a comma or a bracket
        raise _misfit(spec, shape)
    brackets = _Brackets(shape if nested else [count])
    result = np.empty(count, dtype=spec.dtype)
    at = filled = matched = 0
    while at < len(text):
        piece = bytes(text[at : at + _PIECE_BYTES])
        at += len(piece)
        if at < len(text):  # end with a whole number
            whole = piece.rfind(b",") + 1
            if not whole:
                raise _misfit(spec, shape)
            at -= len(piece) - whole
            piece = piece[:whole]
        found = piece.translate(None, _NO_BRACKETS_OR_COMMAS)
        numbers = piece.translate(_BRACKETS_AS_SPACES).strip()
        values = _typed(decode(b"[" + (numbers[:-1] if at < len(text) else numbers) + b"]"), spec, truth_values=True)
        if found != brackets.part(matched, matched + len(found)) or filled + len(values) > count:
            raise _misfit(spec, shape)
        matched += len(found)
        result[filled : filled + len(values)] = values
        filled += len(values)
        time.sleep(YIELD_S)
    if filled != count or matched != brackets.length:
        raise _misfit(spec, shape)
    return result.reshape(shape)


class _Brackets:
    """The brackets and commas of nested lists of a shape; all of them would be as long as the text itself. length: how many."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._size = shape[0] if shape else 0
        self._inner = _Brackets(shape[1:]) if len(shape) > 1 else None
        period = 1 if self._inner is None else self._inner.length + 1
        self.length: int = (1 + self._size * period if self._size else 2) if shape else 0

    def part(self, start: int, stop: int) -> bytes:
        """Those from `start` to `stop`, or to the end."""
        stop = min(stop, self.length)
        if start >= stop:
            return b""
        # "[", and then for each element its own brackets and a comma, of which the last is "]" in place of the comma.
        text = self._elements(max(start, 1) - 1, stop - 1)
        if stop == self.length:
            text = text[:-1] + b"]" if self._size else b"]"[: stop - max(start, 1)]
        return b"[" + text if start == 0 else text

    def _elements(self, start: int, stop: int) -> bytes:
        """A part of what stands behind the first bracket."""
        inner = self._inner
        if inner is None:
            return b"," * (stop - start)
        period = inner.length + 1
        if period <= _PIECE_BYTES:
            first = start // period
            text = (inner.part(0, inner.length) + b",") * (-(-stop // period) - first)
            return text[start - first * period : stop - first * period]
        parts: list[bytes] = []
        while start < stop:
            at = start % period
            until = min(at + stop - start, period)
            parts += (inner.part(at, until), b"," if until == period else b"")
            start += until - at
        return b"".join(parts)


def to_json(numbers: np.ndarray) -> msgspec.Raw:
    """All numbers in one list, as JSON; NaN and infinities are null."""
    flat = numbers.reshape(-1)
    if flat.size <= LARGE_ELEMENTS:
        return msgspec.Raw(msgspec.json.encode(flat.tolist()))
    pieces = []
    for start in range(0, flat.size, PIECE_ELEMENTS):
        pieces.append(msgspec.json.encode(flat[start : start + PIECE_ELEMENTS].tolist())[1:-1])
        time.sleep(YIELD_S)
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")


def is_large(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether it takes long to write these as JSON."""
    return any(each.size > LARGE_ELEMENTS for each in arrays.values())
