"""Health checks over gRPC, and the log of the gRPC door: of single calls and of streams, with the ids of requests."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnx.parser
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError, InputError, QueueFullError, UnavailableError
from deploy.runtime.batching.batcher import BatcherOptions
from deploy.serving.grpc_door import GrpcDoor
from deploy.serving.grpc_messages import message
from deploy.serving.models import ModelOptions, Models
from deploy.serving.options import ServerOptions
from deploy.serving.source import ModelSource

from .conftest import Server

REQUEST = message("inference.ModelInferRequest")
RESPONSES = {"ModelInfer": "ModelInferResponse", "ModelStreamInfer": "ModelStreamInferResponse"}
BUG = ZeroDivisionError("division by zero")
FAILING = BackendError("the device is lost")


def request(id_: str = "", model: str = "net", pixels: int = 28) -> Any:
    made = REQUEST(model_name=model, id=id_)
    made.inputs.add(name="input", datatype="FP32", shape=[1, 1, 28, pixels])
    made.raw_input_contents.append(np.zeros((1, 1, 28, pixels), np.float32).tobytes())
    return made


def talk(artifact: Artifact, method: str, requests: Sequence[Any], error: Exception | None, **options: Any) -> list[Any]:
    """The answers to `requests`, sent over one call of a stream or one after the other; `error` is what the model then raises.

    Where the call itself fails its status takes the place of the answer.
    """

    async def main() -> list[Any]:
        models = Models([ModelSource(name="net", path=artifact.path)], ModelOptions(batching=BatcherOptions(max_rows=4)))
        models.load_all()
        if error is not None:

            async def infer(*_: Any, **__: Any) -> Any:
                raise error

            models.infer = infer  # type: ignore[method-assign]
        door = await GrpcDoor.open(models, ServerOptions(http_port=None, grpc_port=0, **options))
        try:
            async with grpc.aio.insecure_channel(door.address) as channel:
                return await ask(channel)
        finally:
            await door.close()
            models.close()

    async def ask(channel: Any) -> list[Any]:
        answers: list[Any] = []
        call = getattr(channel, "stream_stream" if method == "ModelStreamInfer" else "unary_unary")(
            f"/inference.GRPCInferenceService/{method}",
            request_serializer=lambda sent: sent if isinstance(sent, bytes) else sent.SerializeToString(),
            response_deserializer=message(f"inference.{RESPONSES[method]}").FromString,
        )
        try:
            if method == "ModelStreamInfer":
                async for answer in call(iter(requests), timeout=30):
                    answers.append(answer)
            else:
                for sent in requests:
                    answers.append(await call(sent, timeout=30))
        except grpc.RpcError as failed:
            answers.append(failed.code())  # type: ignore[attr-defined]
        return answers

    return asyncio.run(main())


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.getMessage() == "rpc"]


@pytest.mark.parametrize("method", RESPONSES)
@pytest.mark.parametrize("error", [BUG, FAILING, ValueError("a bug")])
def test_an_error_in_the_server_is_logged_with_the_id_of_its_request(
    shared_lenet5: Artifact, caplog: pytest.LogCaptureFixture, method: str, error: Exception
) -> None:
    caplog.set_level(logging.INFO, "deploy")
    answers = talk(shared_lenet5, method, [request("mine-7")], error)
    (record,) = logged(caplog)
    assert (record.levelname, record.method, record.status) == ("ERROR", method, "INTERNAL")  # type: ignore[attr-defined]
    assert (record.request_id, record.error) == ("mine-7", str(error))  # type: ignore[attr-defined]
    assert bool(record.exc_info) == (error is not FAILING), "the traceback of a bug"
    if method == "ModelStreamInfer" and error is FAILING:
        assert [(answer.error_message, answer.infer_response.id) for answer in answers] == [("the device is lost", "mine-7")]
    else:
        assert answers == [grpc.StatusCode.INTERNAL]


def test_an_error_that_does_not_end_the_stream_is_logged_for_each_request(
    shared_lenet5: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deploy")
    answers = talk(shared_lenet5, "ModelStreamInfer", [request("a"), request("b")], FAILING)
    assert [answer.error_message for answer in answers] == [str(FAILING)] * 2
    assert [record.request_id for record in logged(caplog)] == ["a", "b"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", RESPONSES)
@pytest.mark.parametrize("error", [InputError("no"), QueueFullError("later"), UnavailableError("gone")])
def test_errors_of_clients_and_of_the_moment_are_logged_where_all_requests_are(
    shared_lenet5: Artifact, caplog: pytest.LogCaptureFixture, method: str, error: Exception
) -> None:
    caplog.set_level(logging.INFO, "deploy")
    talk(shared_lenet5, method, [request("x")], error)
    assert not logged(caplog)
    talk(shared_lenet5, method, [request("x")], error, log_requests=True)
    (record,) = logged(caplog)
    assert (record.levelname, record.request_id, record.error) == ("INFO", "x", str(error))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", RESPONSES)
def test_every_request_is_logged_when_asked_for(shared_lenet5: Artifact, caplog: pytest.LogCaptureFixture, method: str) -> None:
    caplog.set_level(logging.INFO, "deploy")
    answers = talk(shared_lenet5, method, [request("1"), request(), request("3")], None, log_requests=True)
    assert len(answers) == 3
    records = logged(caplog)
    assert [(record.method, record.status) for record in records] == [(method, "OK")] * 3  # type: ignore[attr-defined]
    # The requests of a stream are answered in order, but computed together.
    assert sorted(getattr(record, "request_id", "") for record in records) == ["", "1", "3"]


@pytest.mark.parametrize("method", RESPONSES)
def test_bytes_that_are_no_message_and_callers_without_a_token_are_refused_and_logged(
    shared_lenet5: Artifact, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    caplog.set_level(logging.INFO, "deploy")
    assert talk(shared_lenet5, method, [b"\xff\xff"], None, log_requests=True) == [grpc.StatusCode.INVALID_ARGUMENT]
    assert talk(shared_lenet5, method, [request()], None, token="a-token-of-24-characters") == [grpc.StatusCode.UNAUTHENTICATED]
    assert [record.status for record in logged(caplog)] == ["INVALID_ARGUMENT", "UNAUTHENTICATED"]  # type: ignore[attr-defined]


def test_health_checks_of_grpc(limited: Server) -> None:
    with grpc.insecure_channel(limited.grpc) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=message("grpc.health.v1.HealthCheckResponse").FromString,
        )
        ask = message("grpc.health.v1.HealthCheckRequest")
        assert check(ask()).status == 1
        assert check(ask(service="digits")).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            check(ask(service="nobody"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_connections_beyond_the_bound_are_turned_away_and_leave_room_when_they_go(shared_lenet5: Artifact) -> None:
    def closed(client: socket.socket) -> bool:
        with contextlib.suppress(ConnectionResetError):
            while client.recv(4096):  # what the server says at first
                pass
        return True

    def flood(port: int) -> int:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(9)]
            ended = 0
            for client in clients:
                client.settimeout(0.3)
                with contextlib.suppress(TimeoutError):
                    ended += closed(client)
            return ended

    async def main() -> None:
        door = await GrpcDoor.open(Models([], ModelOptions()), ServerOptions(http_port=None, grpc_port=0, connections=4))
        try:
            assert await asyncio.to_thread(flood, int(door.address.rpartition(":")[2])) == 5
            async with grpc.aio.insecure_channel(door.address) as channel:
                ask = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
                assert await ask(b"", wait_for_ready=True, timeout=20)
        finally:
            await door.close()

    asyncio.run(main())


@pytest.mark.parametrize("method", RESPONSES)
def test_large_requests_and_answers_are_exact_typed_and_raw(tmp_path: Path, method: str) -> None:
    graph = "g (int64[N, 70000] x) => (int64[N, 70000] y) { y = Identity(x) }"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {graph}'), tmp_path / "large.onnx")
    values = np.random.default_rng(0).integers(-(2**63), 2**63, (1, 70_000))
    values[0, :3] = -(2**63), 2**63 - 1, 2**53 + 1
    typed, raw, short = (REQUEST(model_name="net") for _ in range(3))
    for made in (typed, raw, short):
        made.inputs.add(name="x", datatype="INT64", shape=[1, 70_000])
    typed.inputs[0].contents.int64_contents.extend(values[0].tolist())
    raw.raw_input_contents.append(values.tobytes())
    short.inputs[0].contents.int64_contents.extend(values[0, 1:].tolist())
    artifact = deploy.export(tmp_path / "large", onnx=tmp_path / "large.onnx")
    answers = talk(artifact, method, [typed, raw, short], None)
    found, exact, refused = [getattr(each, "infer_response", each) for each in answers]
    np.testing.assert_array_equal(found.outputs[0].contents.int64_contents, values[0])
    assert exact.raw_output_contents[0] == values.tobytes()
    if method == "ModelInfer":
        assert refused == grpc.StatusCode.INVALID_ARGUMENT
    else:
        assert "has 69999 values; its shape takes 70000" in answers[2].error_message


def test_a_request_without_tensors_is_small(limited: Server) -> None:
    with grpc.insecure_channel(limited.grpc) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")
        assert ask(b"\x7a\x01a" * 1000, timeout=30) == b"\x08\x01"
    models = Models([], ModelOptions())

    async def main() -> None:
        door = await GrpcDoor.open(models, ServerOptions(http_port=None, grpc_port=0))
        try:
            async with grpc.aio.insecure_channel(door.address) as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    await channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")(
                        b"\x7a\x01a" * (1 << 19), timeout=30
                    )
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        finally:
            await door.close()

    asyncio.run(main())
