"""JSON numbers: exact, not finite, and large ones in pieces."""

import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.serving import numbers
from deploy.serving.numbers import Cut, decode, from_json, from_text, is_large, to_json
from tests.memory import peak_bytes


def spec(dtype: str) -> TensorSpec:
    return TensorSpec(name="x", dtype=dtype, shape=("batch", 3))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("read", [from_json, lambda data, of, shape: from_text(memoryview(json.dumps(data).encode()), of, shape)])
def test_integers_are_exact_to_their_limits_and_not_beyond(dtype: str, read: Any) -> None:
    least, most = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    values = [least, 1, most]
    assert read(values, spec(dtype), [1, 3]).tolist() == [values]
    for beyond in ([least - 1, 0, 0], [0, 0, most + 1]):
        with pytest.raises(InputError, match="go beyond"):
            read(beyond, spec(dtype), [1, 3])
    for wrong in ([1, 2, 3.0], [1, 2, True], [1, None, 2], [1, 2, "3"]):
        with pytest.raises(InputError, match=r"are not all|no JSON"):
            read(wrong, spec(dtype), [1, 3])


@pytest.mark.parametrize("text", ["[NaN, Infinity, -Infinity]", '["NaN", "Infinity", "-Infinity"]'])
def test_numbers_that_are_not_finite_are_taken_as_clients_write_them(text: str) -> None:
    found = from_json(decode(text.encode()), spec("float32"), [1, 3])
    assert (math.isnan(found[0, 0]), found[0, 1], found[0, 2]) == (True, math.inf, -math.inf)


def test_null_is_nan_as_the_server_answers_it() -> None:
    made = bytes(to_json(np.array([math.nan, 1.5, math.inf], np.float32)))
    assert json.loads(made) == [None, 1.5, None]
    assert math.isnan(from_json(json.loads(made), spec("float32"), [3])[2])


def test_a_finite_number_that_the_datatype_cannot_hold_is_refused() -> None:
    with pytest.raises(InputError, match="go beyond FP32"):
        from_json([1e39, 0, 0], spec("float32"), [1, 3])
    with pytest.raises(InputError, match="go beyond FP32"):
        from_json([10**400, 0, 0], spec("float32"), [1, 3])
    with pytest.raises(InputError, match="no JSON"):
        decode(b"[NaN, 1e999]")


FITTING = [
    ([[1, 2, 3], [4, 5, 6]], [2, 3]),
    ([1, 2, 3, 4, 5, 6], [2, 3]),
    ([[[1], [2]]], [1, 2, 1]),
    ([], [0, 3]),
    ([[], []], [2, 0]),
]
RAGGED = [
    ([[1, 2, 3], [4, 5]], [2, 3]), ([[1, 2, 3, 4, 5, 6]], [2, 3]), ([[1, 2], [3, 4], [5, 6]], [2, 3]), ([1, [2]], [2]),
    ([[1], 2], [2, 1]), ([1], [0]), ([[]], [1]), ([[[1, 2, 3], [4, 5, 6]]], [2, 3]), ([1, 2], [2, 1, 2]),
]  # fmt: skip


@pytest.mark.parametrize("pieces", [1 << 16, 20])
@pytest.mark.parametrize(("data", "shape"), FITTING)
def test_nested_and_flat_lists_are_read_whole_or_in_pieces(
    monkeypatch: pytest.MonkeyPatch, data: list[Any], shape: Sequence[int], pieces: int
) -> None:
    monkeypatch.setattr(numbers, "_PIECE_BYTES", pieces)
    wanted = np.array(data, dtype=np.int64).reshape(shape)
    for text in (json.dumps(data), json.dumps(data, indent=1), json.dumps(data, separators=(",", ":"))):
        np.testing.assert_array_equal(from_text(memoryview(text.encode()), spec("int64"), shape), wanted)
    np.testing.assert_array_equal(from_json(data, spec("int64"), shape), wanted)


@pytest.mark.parametrize("pieces", [1 << 16, 20])
@pytest.mark.parametrize(("data", "shape"), RAGGED)
def test_lists_of_another_shape_are_refused(
    monkeypatch: pytest.MonkeyPatch, data: list[Any], shape: Sequence[int], pieces: int
) -> None:
    monkeypatch.setattr(numbers, "_PIECE_BYTES", pieces)
    for read, given in ((from_json, data), (from_text, memoryview(json.dumps(data).encode()))):
        with pytest.raises(InputError):
            read(given, spec("int64"), shape)


@pytest.mark.parametrize(
    "text", ["[[1,2]3,[4,5]]", "[[1,],[2,3]]", "[1,2,3,4]]", "[[1,2],[3,4]", "[1 2,3,4]", "[{,2,3,4]", "[1,2,3,4,]"]
)
def test_text_that_is_no_list_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        from_text(memoryview(text.encode()), spec("int64"), [2, 2])


@pytest.mark.parametrize("shape", [[0], [1], [7], [3, 0], [0, 3], [2, 3], [5, 1], [1, 1, 4], [2, 3, 2]])
@pytest.mark.parametrize("pieces", [1, 4, 1 << 16])
def test_the_brackets_of_nested_lists_are_those_of_json(monkeypatch: pytest.MonkeyPatch, shape: list[int], pieces: int) -> None:
    monkeypatch.setattr(numbers, "_PIECE_BYTES", pieces)
    text = json.dumps(np.zeros(shape, int).tolist()).replace("0", "").replace(" ", "").encode()
    brackets = numbers._Brackets(shape)
    assert brackets.length == len(text)
    for start in range(len(text) + 1):
        for stop in range(start, len(text) + 3):
            assert brackets.part(start, stop) == text[start:stop]


def test_a_shape_that_the_text_cannot_fill_takes_no_memory() -> None:
    for shape in ([2**39, 0], [1, 2**39]):
        with pytest.raises(InputError):
            from_text(memoryview(b"[[],[]]"), spec("int64"), shape)
        peak = peak_bytes(
            f"""
            try:
                from_text(memoryview(b"[[],[]]"), TensorSpec(name="x", dtype="int64", shape=("n", "m")), {shape})
            except InputError:
                pass
            """,
            before="""
            from deploy.artifact.tensors import TensorSpec
            from deploy.errors import InputError
            from deploy.serving.numbers import from_text
            """,
        )
        assert peak < 1 << 20


def test_arrays_are_cut_out_of_a_document_and_nothing_else() -> None:
    body = json.dumps(
        {"id": 'x"data":[1]', 'k"data': 1, "inputs": [{"data": [1, [2]], "n": 1}, {"n": 2, "data": [3]}, {"data": {}}]}
    )
    cut = Cut(body.encode(), len(body))
    first, second, third = cut.document["inputs"]
    assert bytes(cut.arrays[first["data"]]) == b"[1, [2]]"
    assert bytes(cut.arrays[second["data"]]) == b"[3]"
    assert (first["n"], third["data"], cut.document["id"]) == (1, {}, 'x"data":[1]')


def test_much_json_that_is_not_numbers_is_refused() -> None:
    body = json.dumps({"inputs": [], "x": ["text"] * 200_000}).encode()
    with pytest.raises(InputError, match="send binary tensors"):
        Cut(body, len(body))


def test_a_large_tensor_is_written_as_a_small_one() -> None:
    large = np.random.default_rng(0).standard_normal(3 * numbers.LARGE_ELEMENTS // 2, dtype=np.float32)
    assert is_large({"y": large})
    assert not is_large({"y": large[:9]})
    assert msgspec.json.decode(to_json(large)) == large.tolist()
