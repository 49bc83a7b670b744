"""Both doors with the clients that Triton's users have, and their answers against the session itself."""

import asyncio
import json
import queue
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_client
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException

import deploy
from deploy.artifact.artifact import Artifact
from deploy.serving.numbers import LARGE_BYTES

from .conftest import Server


@pytest.fixture(scope="module")
def server(shared_lenet5: Artifact, pair: Artifact) -> Iterator[Server]:
    started = Server([f"digits={shared_lenet5.path}", str(pair.path), f"digits={shared_lenet5.path}@3", "--max-batch", "16"])
    yield started
    started.kill()


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest, server: Server) -> Iterator[tuple[Any, Any]]:
    module = http_client if request.param == "http" else grpc_client
    with module.InferenceServerClient(getattr(server, request.param)) as client:
        yield module, client


def images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 1, 28, 28), dtype=np.float32)


def tensor(module: Any, name: str, array: np.ndarray, datatype: str = "FP32", **options: Any) -> Any:
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **options)
    return made


def test_the_server_and_its_models_say_what_they_are(door: Any) -> None:
    module, client = door
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "3")
    options = {"as_json": True} if module is grpc_client else {}
    meta = client.get_server_metadata(**options)
    assert meta["name"] == "deploy"
    assert "binary_tensor_data" in meta["extensions"]
    model = client.get_model_metadata("digits", **options)
    assert model["versions"] == ["1", "3"]
    assert model["inputs"][0]["name"] == "input"
    assert [int(size) for size in model["inputs"][0]["shape"]] == [-1, 1, 28, 28]
    config = client.get_model_config("digits", **options)
    config = config.get("config", config)
    assert config["max_batch_size"] == 16
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert [int(size) for size in config["input"][0]["dims"]] == [1, 28, 28]
    index = client.get_model_repository_index(**options)
    index = index.get("models", index) if isinstance(index, dict) else index
    assert [(entry["name"], entry["version"], entry["state"]) for entry in index] == [
        ("digits", "1", "READY"), ("digits", "3", "READY"), ("pair", "1", "READY"),
    ]  # fmt: skip


@pytest.mark.parametrize("binary", [True, False])
def test_answers_are_those_of_the_session(door: Any, shared_lenet5: Artifact, binary: bool) -> None:
    module, client = door
    x = images(3)
    options = {"binary_data": binary} if module is http_client else {}
    inputs = [tensor(module, "input", x, **options)]
    outputs = [module.InferRequestedOutput("logits", **options)]
    result = client.infer("digits", inputs, outputs=outputs, request_id="mine-7")
    with deploy.load(shared_lenet5) as session:
        np.testing.assert_allclose(result.as_numpy("logits"), session(x), rtol=1e-5, atol=1e-6)
    response = result.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "mine-7"
    version = response["model_version"] if isinstance(response, dict) else response.model_version
    assert version == "3"  # the highest
    pinned = client.infer("digits", inputs, model_version="1").get_response()
    assert (pinned["model_version"] if isinstance(pinned, dict) else pinned.model_version) == "1"


@pytest.mark.parametrize("binary", [True, False])
def test_several_inputs_and_outputs_of_different_dtypes(door: Any, binary: bool) -> None:
    module, client = door
    image = np.arange(8, dtype=np.float32).reshape(2, 4)
    factor = np.array([[1, 2, 3, 4], [2**40, 0, -1, 5]], dtype=np.int64)
    options = {"binary_data": binary} if module is http_client else {}
    inputs = [tensor(module, "factor", factor, "INT64", **options), tensor(module, "image", image, **options)]
    both = client.infer("pair", inputs)
    np.testing.assert_array_equal(both.as_numpy("factor_back"), factor * 2)
    np.testing.assert_allclose(both.as_numpy("total"), (image * factor).sum(axis=1, keepdims=True), rtol=1e-6)
    one = client.infer("pair", inputs, outputs=[module.InferRequestedOutput("factor_back", **options)])
    assert one.as_numpy("total") is None
    np.testing.assert_array_equal(one.as_numpy("factor_back"), factor * 2)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(server: Server, algorithm: str) -> None:
    with http_client.InferenceServerClient(server.http) as client:
        x = images(4)
        plain = client.infer("digits", [tensor(http_client, "input", x)]).as_numpy("logits")
        packed = client.infer(
            "digits",
            [tensor(http_client, "input", x)],
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        np.testing.assert_array_equal(packed.as_numpy("logits"), plain)


@pytest.mark.parametrize(
    ("name", "shape", "datatype", "message"),
    [
        ("digits", (1, 1, 28, 27), "FP32", "28"),
        ("digits", (17, 1, 28, 28), "FP32", "17 rows in one request; a batch of 'lenet5' has 16 at most"),
        ("digits", (1, 1, 28, 28), "FP64", "datatype 'FP64'; expected FP32"),
        ("nobody", (1, 1, 28, 28), "FP32", "unknown model 'nobody'"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused_with_the_reason(
    door: Any, name: str, shape: tuple[int, ...], datatype: str, message: str
) -> None:
    module, client = door
    x = np.zeros(shape, np.float64 if datatype == "FP64" else np.float32)
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.infer(name, [tensor(module, "input", x, datatype)])
    expected = {"404", "StatusCode.NOT_FOUND"} if name == "nobody" else {"400", "StatusCode.INVALID_ARGUMENT"}
    assert caught.value.status() in expected
    with pytest.raises(InferenceServerException, match="unknown input 'x'"):
        client.infer("digits", [tensor(module, "x", images(1))])
    with pytest.raises(InferenceServerException, match="has no version '2'"):
        client.infer("digits", [tensor(module, "input", images(1))], model_version="2")


def test_many_async_requests_at_a_time_each_get_their_own(server: Server, shared_lenet5: Artifact) -> None:
    arrays = [images(1 + seed % 4, seed) for seed in range(60)]

    async def main(module: Any, address: str) -> list[np.ndarray]:
        data = http_client if module is http_aio else grpc_client
        async with module.InferenceServerClient(address) as client:
            results = await asyncio.gather(*(client.infer("digits", [tensor(data, "input", x)]) for x in arrays))
        return [result.as_numpy("logits") for result in results]

    with deploy.load(shared_lenet5) as session:
        expected = [session(x) for x in arrays]
    for module, address in ((http_aio, server.http), (grpc_aio, server.grpc)):
        for result, wanted in zip(asyncio.run(main(module, address)), expected, strict=True):
            np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)


def test_a_grpc_stream_answers_in_order_and_an_error_does_not_end_it(server: Server) -> None:
    answers: list[Any] = []
    with grpc_client.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.append(error or result))
        for seed in range(3):
            client.async_stream_infer("digits", [tensor(grpc_client, "input", images(1, seed))], request_id=str(seed))
        client.async_stream_infer("nobody", [tensor(grpc_client, "input", images(1))], request_id="3")
        client.async_stream_infer("digits", [tensor(grpc_client, "input", images(1))], request_id="4")
        client.stop_stream()
    assert [getattr(answer, "get_response", lambda: None)() and answer.get_response().id for answer in answers] == [
        "0",
        "1",
        "2",
        None,
        "4",
    ]
    assert "unknown model 'nobody'" in str(answers[3])
    assert answers[4].get_response().parameters["triton_final_response"].bool_param


def test_the_requests_of_a_stream_share_batches(shared_lenet5: Artifact, serve: Any) -> None:
    server = serve(f"digits={shared_lenet5.path}", "--delay-ms", "5")
    answers: queue.Queue[Any] = queue.Queue()
    with grpc_client.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        for _ in range(100):
            client.async_stream_infer("digits", [tensor(grpc_client, "input", images(1))])
        for _ in range(100):
            assert not isinstance(answers.get(timeout=30), Exception)
        client.stop_stream()
        (entry,) = client.get_inference_statistics("digits").model_stats
    assert entry.inference_count == 100
    assert entry.execution_count < 50


def test_outputs_come_as_classes_where_that_is_asked_for(door: Any) -> None:
    module, client = door
    x = images(2)
    logits = client.infer("digits", [tensor(module, "input", x)]).as_numpy("logits")
    output = module.InferRequestedOutput("logits", class_count=3)
    found = client.infer("digits", [tensor(module, "input", x)], outputs=[output]).as_numpy("logits")
    assert found.shape == (2, 3)
    assert [[int(text.split(b":")[1]) for text in row] for row in found] == np.argsort(-logits, axis=1)[:, :3].tolist()


@pytest.mark.parametrize("flat", [True, False])
def test_json_that_is_read_in_pieces_is_answered_as_any_other(server: Server, shared_lenet5: Artifact, flat: bool) -> None:
    x = images(16)
    data = x.reshape(-1).tolist() if flat else x.tolist()
    tensors = [{"name": "input", "datatype": "FP32", "shape": list(x.shape), "data": data}]
    content = json.dumps({"id": "7", "inputs": tensors}, separators=("," + " " * 100, ":")).encode()
    assert len(content) > LARGE_BYTES
    request = urllib.request.Request(f"http://{server.http}/v2/models/digits/infer", content)
    with urllib.request.urlopen(request, timeout=60) as answer:
        document = json.loads(answer.read())
    assert document["id"] == "7"
    with deploy.load(shared_lenet5) as session:
        np.testing.assert_allclose(document["outputs"][0]["data"], session(x).reshape(-1), rtol=1e-4, atol=1e-5)


def test_options_that_are_not_known_are_refused(door: Any) -> None:
    module, client = door
    with pytest.raises(InferenceServerException, match=r"'sequence_\w+', which is not supported"):
        client.infer("digits", [tensor(module, "input", images(1))], sequence_id=7, sequence_start=True)


def test_statistics_count_requests_rows_and_batches(server: Server, door: Any) -> None:
    module, client = door

    def counts() -> tuple[int, int]:
        options = {"as_json": True} if module is grpc_client else {}
        (entry,) = client.get_inference_statistics("pair", **options)["model_stats"]
        return int(entry.get("inference_count", 0)), int(entry["inference_stats"]["success"].get("count", 0))

    inputs = [
        tensor(module, "image", np.zeros((3, 4), np.float32)),
        tensor(module, "factor", np.zeros((3, 4), np.int64), "INT64"),
    ]
    before = counts()
    client.infer("pair", inputs)
    assert counts() == (before[0] + 3, before[1] + 1)
    with urllib.request.urlopen(f"http://{server.http}/metrics") as answer:
        text = answer.read().decode()
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert f'nv_inference_count{{model="pair",version="1"}} {before[0] + 3}\n' in text
