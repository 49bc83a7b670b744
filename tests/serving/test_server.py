"""A server as a whole: what it does not start with, and how it stops."""

import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.serving.grpc_messages import message

from .conftest import INFER, Server, body, call


def test_a_damaged_artifact_is_not_served(lenet5: Artifact) -> None:
    content = bytearray(lenet5.onnx_path.read_bytes())
    content[len(content) // 2] ^= 1
    lenet5.onnx_path.write_bytes(bytes(content))
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "serve", str(lenet5.path), "--http-port", "0", "--grpc-port", "0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said(limited: Server, shared_lenet5: Artifact) -> None:
    for option, address in (("--http-port", limited.http), ("--grpc-port", limited.grpc)):
        other = "--no-grpc" if option == "--http-port" else "--no-http"
        done = subprocess.run(
            [sys.executable, "-m", "deploy", "serve", str(shared_lenet5.path), option, address.rpartition(":")[2], other],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "in use" in done.stderr
        assert "Traceback" not in done.stderr


def test_slow_and_half_open_clients_hold_nobody_up(shared_lenet5: Artifact, serve: Callable[..., Server]) -> None:
    server = serve(f"digits={shared_lenet5.path}", "--body-timeout", "0.5")
    host, _, port = server.http.partition(":")
    slow = [socket.create_connection((host, int(port)), timeout=20) for _ in range(50)]
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n".encode()
    for number, connection in enumerate(slow):
        connection.sendall(head[: len(head) // 2] if number % 2 else head + b"{")
    start = time.perf_counter()
    assert call(server, INFER, body())[0] == 200
    assert time.perf_counter() - start < 2
    assert b" 408 " in slow[0].recv(200)
    for connection in slow:
        connection.close()
    assert call(server, INFER, body())[0] == 200


def test_sigterm_answers_what_was_accepted_and_exits_0(shared_lenet5: Artifact, serve: Callable[..., Server]) -> None:
    server = serve(f"digits={shared_lenet5.path}", "--stop-delay", "0.5")
    answered = 0
    wrong: list[str] = []
    stopping = threading.Event()
    lock = threading.Lock()

    def client() -> None:
        host, _, port = server.http.partition(":")
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=30)) as connection:
            while ask(connection):
                pass

    def ask(connection: http.client.HTTPConnection) -> bool:
        nonlocal answered
        try:
            connection.request("POST", INFER, body(2), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            # After the stop a connection is refused, or closed while it was idle: the request was not accepted.
            if not stopping.is_set() or not isinstance(error, ConnectionError | http.client.RemoteDisconnected):
                wrong.append(repr(error))
            return False
        if answer.status != 200:
            wrong.append(str(answer.status))
        with lock:
            answered += 1
        return True

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    stopping.set()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert call(server, "/v2/health/ready")[0] == 503  # it still takes requests, and says that it is going
    assert server.process.wait(30) == 0
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert answered > 50
    assert [line["message"] for line in server.log if line["message"] in ("stopping", "stopped")] == ["stopping", "stopped"]


def infer_message(request_id: str) -> bytes:
    request = message("inference.ModelInferRequest")(model_name="digits", id=request_id)
    request.inputs.add(name="input", datatype="FP32", shape=[1, 1, 28, 28])
    request.raw_input_contents.append(np.zeros((1, 1, 28, 28), np.float32).tobytes())
    return bytes(request.SerializeToString())


def test_sigterm_answers_what_streams_and_calls_had_sent_and_ends_them(
    shared_lenet5: Artifact, serve: Callable[..., Server]
) -> None:
    server = serve(f"digits={shared_lenet5.path}", "--stop-delay", "0.5", "--delay-ms", "2")
    sent: list[list[str]] = [[] for _ in range(4)]
    heard: list[list[str]] = [[] for _ in range(4)]
    codes: list[object] = []
    stop = threading.Event()
    method = "/inference.GRPCInferenceService/"
    read = message("inference.ModelStreamInferResponse").FromString

    def stream(number: int) -> None:
        def requests() -> Iterator[bytes]:
            while not stop.is_set():
                sent[number].append(str(len(sent[number])))
                yield infer_message(sent[number][-1])
                time.sleep(0.005)
            ended.wait(30)  # the client leaves its side of the stream open

        with grpc.insecure_channel(server.grpc) as channel:
            try:
                for answer in channel.stream_stream(f"{method}ModelStreamInfer")(requests()):
                    response = read(answer)
                    assert not response.error_message
                    heard[number].append(response.infer_response.id)
            except grpc.RpcError as error:
                codes.append(error.code())

    def watch() -> None:
        with grpc.insecure_channel(server.grpc) as channel, contextlib.suppress(grpc.RpcError):
            list(channel.unary_stream("/grpc.health.v1.Health/Watch")(b""))

    ended = threading.Event()
    threads = [threading.Thread(target=stream, args=(number,)) for number in range(4)] + [threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    stop.set()  # what was sent until now is sent before the door closes
    start = time.monotonic()
    assert server.process.wait(30) == 0
    assert time.monotonic() - start < 10, "the grace is 30 s, and the streams stay open"
    ended.set()
    for thread in threads:
        thread.join(30)
    assert heard == sent
    assert all(len(each) > 10 for each in sent)
    assert codes == [grpc.StatusCode.UNAVAILABLE] * 4


def test_a_second_signal_ends_the_server_at_once(shared_lenet5: Artifact, serve: Callable[..., Server]) -> None:
    server = serve(f"digits={shared_lenet5.path}", "--stop-delay", "60")
    server.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 20
    while not any(line["message"] == "stopping" for line in server.log):
        assert time.monotonic() < end
        time.sleep(0.02)
    start = time.monotonic()
    assert server.stop(signal.SIGINT) == 130
    assert time.monotonic() - start < 5
    assert server.log[-1]["error"] == "ended at once by a second signal"
