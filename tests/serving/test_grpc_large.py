"""Large requests over gRPC: taken apart to what protobuf would have read, and never read in one go."""

from typing import Any

import numpy as np
import pytest

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.serving import grpc_large
from deploy.serving.grpc_large import LARGE_BYTES, cut, from_pieces
from deploy.serving.grpc_messages import message

REQUEST = message("inference.ModelInferRequest")
RNG = np.random.default_rng(0)
FIELDS = {
    "bool_contents": RNG.integers(0, 2, 9000).astype(bool),
    "int_contents": RNG.integers(-(2**31), 2**31, 9000).astype(np.int32),
    "int64_contents": np.array([-(2**63), 2**63 - 1, 0, -1] * 3000),
    "uint_contents": RNG.integers(0, 2**32, 9000).astype(np.uint32),
    "uint64_contents": np.array([2**64 - 1, 2**53 + 1, 0] * 3000, np.uint64),
    "fp32_contents": np.array([np.nan, np.inf, -np.inf, 1e-45, 0.1] * 2000, np.float32),
    "fp64_contents": np.array([np.nan, np.inf, -np.inf, 5e-324, 0.1] * 2000),
}


def typed(**fields: np.ndarray) -> Any:
    made = REQUEST(model_name="net", model_version="7", id="x")
    made.parameters["priority"].int64_param = -3
    for name, values in fields.items():
        tensor = made.inputs.add(name=name, datatype="X", shape=[len(values)])
        tensor.parameters["a"].bool_param = True
        getattr(tensor.contents, name).extend(values.tolist())
    made.outputs.add(name="y")
    return made


def spec(values: np.ndarray) -> TensorSpec:
    return TensorSpec(name="x", dtype=str(values.dtype), shape=("N",))


def read(name: str, pieces: Any, values: np.ndarray) -> np.ndarray:
    return from_pieces(name, pieces, spec(values), values.dtype, [len(values)])


@pytest.mark.parametrize("name", FIELDS)
def test_numbers_in_contents_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = FIELDS[name]
    monkeypatch.setattr(grpc_large, "_PIECE_BYTES", 37)
    monkeypatch.setattr(grpc_large, "YIELD_S", 0)
    received = cut(typed(**{name: values}).SerializeToString())
    assert received.contents.keys() == {0}
    found = read(name, received.contents[0][name], values)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_what_is_left_is_the_request_without_its_numbers() -> None:
    whole = typed(**FIELDS)
    small = np.arange(3, dtype=np.float32)
    whole.inputs.insert(2, typed(fp32_contents=small).inputs[0])
    received = cut(whole.SerializeToString())
    assert sorted(received.contents) == [0, 1, *range(3, 8)]
    for index, tensor in enumerate(whole.inputs):
        if index in received.contents:
            tensor.contents.Clear()
            tensor.contents.SetInParent()
    assert received.message == whole
    assert received.message.inputs[0].HasField("contents")
    assert list(received.message.inputs[2].contents.fp32_contents) == [0, 1, 2]


def test_raw_contents_are_views_in_their_order() -> None:
    made = REQUEST(model_name="net", raw_input_contents=[b"a" * 5000, b"b", b"", b"c" * 9000])
    data = made.SerializeToString()
    received = cut(data)
    assert {index: bytes(view) for index, view in received.raw.items()} == {0: b"a" * 5000, 3: b"c" * 9000}
    assert all(view.obj is data for view in received.raw.values())
    assert list(received.message.raw_input_contents) == [b"", b"b", b"", b""]


def test_contents_in_several_pieces_are_one() -> None:
    values = FIELDS["int64_contents"]
    halves = [typed(int64_contents=half).SerializeToString() for half in (values[:6000], values[6000:])]
    pieces = [cut(half).contents[0]["int64_contents"][0] for half in halves]
    np.testing.assert_array_equal(read("int64_contents", pieces, values), values)


@pytest.mark.parametrize("name", ["int64_contents", "fp32_contents"])
@pytest.mark.parametrize("change", [-1, 1, 2**40])
def test_another_count_than_the_shape_takes_is_refused(name: str, change: int) -> None:
    values = FIELDS[name]
    pieces = cut(typed(**{name: values}).SerializeToString()).contents[0][name]
    with pytest.raises(InputError):
        from_pieces(name, pieces, spec(values), values.dtype, [len(values) + change])


def test_damaged_requests_are_refused_wherever_they_are_cut() -> None:
    data = typed(int64_contents=FIELDS["int64_contents"], fp32_contents=FIELDS["fp32_contents"]).SerializeToString()
    for end in (*range(1, 60), *range(60, len(data), 997), len(data) - 1):
        try:
            received = cut(data[:end])
        except InputError:
            continue
        assert received.message == REQUEST.FromString(data[:end]), "cut off between two fields"
    for damaged in (b"\x80" * 11, b"\x03", b"\x00\x00", b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x09abc"):
        with pytest.raises(InputError):
            cut(damaged)
    with pytest.raises(InputError):
        read("int64_contents", [memoryview(b"\xff" * 5000)], FIELDS["int64_contents"])


@pytest.mark.parametrize("field", [b"\x0a\x01a", b"\x3a\x00", b"\x2a\x00", b"\x78\x01"])
def test_many_small_parts_are_refused(field: bytes) -> None:
    with pytest.raises(InputError, match="are not tensors of some size"):
        cut(field * (2 * LARGE_BYTES))


def test_numbers_that_are_not_packed_are_refused_where_they_are_many() -> None:
    contents = b"\x18\x01" * LARGE_BYTES  # each int64 with its own tag
    size = bytes((len(contents) & 0x7F | 0x80, len(contents) >> 7 & 0x7F | 0x80, len(contents) >> 14))
    tensor = b"\x2a" + size + contents
    size = bytes((len(tensor) & 0x7F | 0x80, len(tensor) >> 7 & 0x7F | 0x80, len(tensor) >> 14))
    with pytest.raises(InputError, match="packed contents"):
        cut(b"\x2a" + size + tensor)
