"""A server as a whole: what it does not start with, and how it stops."""

import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from deploy.artifact.artifact import Artifact

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
