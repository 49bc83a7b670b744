"""Requests and answers in JSON and in binary."""

import json
import math

import numpy as np
import pytest

from deploy.artifact.tensors import TensorSpec
from deploy.errors import InputError
from deploy.serving.protocol import build_response, parse_request
from deploy.serving.request import Wanted

INPUTS = (TensorSpec(name="x", dtype="float32", shape=("batch", 2)), TensorSpec(name="n", dtype="int64", shape=("batch",)))
OUTPUTS = (TensorSpec(name="y", dtype="float32", shape=("batch", 2)), TensorSpec(name="z", dtype="int64", shape=("batch",)))
X, N = np.array([[1.5, -2.0], [0.0, 4.0]], np.float32), np.array([3, -(2**40)])


def request(binary: bool, **more: object) -> tuple[bytes, int | None]:
    entries, tail = [], b""
    for name, datatype, array in (("x", "FP32", X), ("n", "INT64", N)):
        entry: dict[str, object] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        else:
            entry["data"] = array.tolist()
        entries.append(entry)
    head = json.dumps({"inputs": entries, **more}).encode()
    return head + tail, len(head) if binary else None


@pytest.mark.parametrize("binary", [True, False])
def test_a_request_is_read_whatever_its_form(binary: bool) -> None:
    body, length = request(binary, id="7", parameters={"priority": 1, "timeout": 2_000_000})
    parsed = parse_request(body, length, INPUTS, OUTPUTS)
    np.testing.assert_array_equal(parsed.feed["x"], X)
    np.testing.assert_array_equal(parsed.feed["n"], N)
    assert (parsed.feed["x"].dtype, parsed.feed["n"].dtype) == (np.float32, np.int64)
    assert (parsed.id, parsed.priority, parsed.timeout_s) == ("7", 1, 2.0)
    assert parsed.outputs == (Wanted(name="y"), Wanted(name="z"))


def test_an_answer_mixes_json_and_binary_as_it_was_asked_for() -> None:
    outputs = [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}]
    parsed = parse_request(*request(False, outputs=outputs, id="a"), INPUTS, OUTPUTS)
    body, length = build_response("net", "1", parsed, {"y": np.array([[1.0, math.nan]], np.float32), "z": N})
    assert length is not None
    document = json.loads(body[:length])
    assert (document["model_name"], document["id"]) == ("net", "a")
    assert document["outputs"][1]["data"] == [1.0, None]
    np.testing.assert_array_equal(np.frombuffer(body[length:], np.int64), N)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "missing x"), ({"inputs": {}}, "a list of inputs"), ({"id": 7}, "id must be a string"),
        ({"outputs": [{"name": "w"}]}, "unknown output 'w'"), ({"outputs": [{"name": "y"}] * 2}, "asked for twice"),
        ({"parameters": {"timeout": -1}}, "timeout must be"), ({"parameters": {"priority": "high"}}, "priority must be"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_said(change: dict[str, object], message: str) -> None:
    body, _ = request(False)
    with pytest.raises(InputError, match=message):
        parse_request(json.dumps({**json.loads(body), **change}).encode(), None, INPUTS, OUTPUTS)


@pytest.mark.parametrize("length", [-1, 10**6])
def test_a_length_beyond_the_body_is_refused(length: int) -> None:
    with pytest.raises(InputError, match="Inference-Header-Content-Length"):
        parse_request(request(False)[0], length, INPUTS, OUTPUTS)


@pytest.mark.parametrize("word", ["true", "false"])
@pytest.mark.parametrize(
    "text",
    [
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, WORD, 0.5]}]}',
        '{"inputs": [{"data": [[0.5, 1, WORD]], "shape": [1, 3], "datatype": "FP32", "name": "x"}]}',
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "d\\u0061ta": [WORD, 1, 0]}], "id": "data"}',
    ],
    ids=["last", "first", "escaped"],
)
def test_truth_values_are_no_numbers_wherever_the_data_stand(text: str, word: str) -> None:
    x = (TensorSpec(name="x", dtype="float32", shape=("batch", 3)),)
    with pytest.raises(InputError, match="not all FP32"):
        parse_request(text.replace("WORD", word).encode(), None, x, ())
    read = parse_request(text.replace("WORD", "2").encode(), None, x, ()).feed["x"]
    assert sorted(read[0].tolist()) in ([0.5, 1, 2], [0, 1, 2])
