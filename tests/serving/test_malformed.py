"""Requests that no client means to send: whatever comes, it is answered, never with a 5xx, and takes nothing with it."""

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.artifact.artifact import Artifact

from .conftest import SOAK, Server

EXAMPLES = 10_000 if SOAK else 400
LONGEST_S = 5.0
INFER = "/v2/models/pair/infer"

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
sizes = st.integers(-3, 6) | st.integers(-(2**70), 2**70) | st.sampled_from([0, 2**31, 2**63, 2**64, 10**30]) | anything
shapes = st.lists(sizes, max_size=5) | anything
datatypes = st.sampled_from(["FP32", "INT64", "BOOL", "FP16", "BF16", "BYTES", "", "fp32"]) | anything
numbers = st.lists(st.floats() | st.integers() | st.booleans() | st.none() | st.text(max_size=3), max_size=10)
data = numbers | st.lists(numbers, max_size=4) | anything
parameters = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "binary_data_output", "priority", "timeout", "classification", "x"]),
    sizes,
    max_size=3,
)
names = st.sampled_from(["image", "factor", "total", "factor_back", "", "x"]) | anything


def some(**fields: Any) -> Any:
    """Objects with any of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


good_inputs = st.just(
    [
        {"name": "image", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]},
        {"name": "factor", "datatype": "INT64", "shape": [1, 4], "data": [1, 2, 3, 4]},
    ]
)
inputs = st.lists(
    some(name=names, datatype=datatypes, shape=shapes, data=data, parameters=parameters | anything) | anything, max_size=4
)
outputs = st.lists(some(name=names, parameters=parameters) | anything, max_size=3) | anything
documents = (
    some(id=anything, inputs=inputs | good_inputs | anything, outputs=outputs, parameters=parameters | anything) | anything
)


def encoded(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")  # NaN and Infinity too, as Python's clients send them


@st.composite
def damaged(draw: Any) -> bytes:
    """A request that was right, with some of its bytes changed, added or cut off."""
    body = bytearray(encoded({"inputs": draw(good_inputs)}))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        body[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(body)


bodies = documents.map(encoded) | damaged() | st.binary(max_size=200)
lengths = (
    st.none() | st.integers(-5, 300).map(str) | st.sampled_from(["", "x", "1e3", "9" * 30, "\u0661".encode().decode("latin-1")])
)
paths = st.sampled_from(
    [INFER, INFER, INFER, "/v2/models/pair/versions/1/infer", "/v2/models/pair/versions/x/infer", "/v2/models//infer",
     "/v2/models/pair/classify", "/v2/models/pair/classify?top=-1", "/v2/repository/index", "/v2/models/%00/infer", "/v2/models/pair/infer/"]
)  # fmt: skip
encodings = st.sampled_from(["", "", "", "gzip", "deflate", "br", "identity"])


@pytest.fixture(scope="module")
def server(pair: Artifact) -> Iterator[Server]:
    started = Server([str(pair.path), "--max-request-mb", "1"])
    yield started
    started.kill()


class Client:
    """Keeps its connection for as long as the server does. statuses: how often each was answered."""

    def __init__(self, server: Server) -> None:
        host, _, port = server.http.partition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=LONGEST_S)
        self.statuses: dict[int, int] = {}

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        for attempt in (0, 1):
            try:
                self._connection.request("POST", path, body, headers)
                answer = self._connection.getresponse()
                content = answer.read()
            except (ConnectionError, http.client.RemoteDisconnected):
                self._connection.close()  # kept alive no longer: once more
                if attempt:
                    raise
            else:
                self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
                return answer.status, content
        raise AssertionError

    def close(self) -> None:
        self._connection.close()


def test_malformed_requests_are_answered_and_never_with_5xx(server: Server) -> None:
    client = Client(server)
    right = encoded(
        {
            "inputs": [
                {"name": "image", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]},
                {"name": "factor", "datatype": "INT64", "shape": [1, 4], "data": [1, 1, 1, 1]},
            ]
        }
    )
    resident: list[int] = []

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(path=paths, body=bodies, length=lengths, encoding=encodings)
    def attack(path: str, body: bytes, length: str | None, encoding: str) -> None:
        headers = {"Content-Encoding": encoding} if encoding else {}
        if length is not None:
            headers["Inference-Header-Content-Length"] = length
        start = time.perf_counter()
        status, content = client.post(path, body, headers)
        assert time.perf_counter() - start < LONGEST_S
        assert status < 500, (status, content)
        if status >= 400 and content:
            assert set(json.loads(content)) == {"error"}
        resident.append(server.resident_bytes)

    with contextlib.closing(client):
        attack()
        assert json.loads(client.post(INFER, right, {})[1])["outputs"][0]["data"] == [10.0]
    assert len(resident) >= EXAMPLES
    assert client.statuses.get(400, 0) > EXAMPLES / 4
    assert client.statuses.get(200, 0) > 1  # some of them are right after all
    quarter = resident[len(resident) // 4]
    assert resident[-1] < quarter * 1.05 + (4 << 20), "memory grows"
    assert not [line for line in server.log if line.get("message") == "a bug in the server"]
    assert not server.other


def test_malformed_messages_over_grpc_are_refused(server: Server) -> None:
    from deploy.serving.grpc_messages import message

    tensor = message("inference.ModelInferRequest")
    statuses = set()
    rng = np.random.default_rng(0)
    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(EXAMPLES // 4):
            request = tensor(model_name=rng.choice(["pair", "pair", "", "x"]), model_version=rng.choice(["", "1", "z"]))
            for name in rng.permutation(["image", "factor", "other"])[: rng.integers(0, 4)]:
                shape = rng.choice([[1, 4], [-1, 4], [2**62, 2**62], [], [2, 4]][rng.integers(0, 5)] or [0], 2)
                datatype = "FP32" if name == "image" else "INT64"
                sent = request.inputs.add(
                    name=name, datatype=rng.choice([datatype, datatype, "BYTES"]), shape=[int(size) for size in shape]
                )
                if rng.random() < 0.3:
                    sent.contents.fp32_contents.extend([1.0] * int(rng.integers(0, 9)))
                if rng.random() < 0.5:
                    request.raw_input_contents.append(bytes(int(rng.choice([0, 16, 32, 5]))))
            body = bytearray(request.SerializeToString())
            if rng.random() < 0.3 and body:
                body[int(rng.integers(0, len(body)))] ^= int(rng.integers(1, 256))
            try:
                infer(bytes(body), timeout=LONGEST_S)
                statuses.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                statuses.add(error.code())
    refused = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert refused <= statuses <= refused | {grpc.StatusCode.OK}
    assert not [line for line in server.log if line.get("level") == "error"]
