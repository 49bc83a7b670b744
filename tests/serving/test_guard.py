"""What a server refuses: callers without a token, requests that are too large or too slow, images that are bombs, damaged models."""

import contextlib
import gzip
import http.client
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.errors import DataError, RefusedError, UsageError
from deploy.serving.guard import Access, Limits, is_loopback, read_token
from deploy.serving.images import check_image
from deploy.serving.options import ServerOptions
from deploy.serving.source import ModelSource

from .conftest import Server, body, call

TOKEN, ADMIN = "a-token-of-24-characters", "another-for-the-admin-call"


@pytest.fixture(scope="module")
def server(shared_lenet5: Artifact) -> Iterator[Server]:
    started = Server([f"digits={shared_lenet5.path}", "--max-request-mb", "1", "--max-pixels", "4000000"])
    yield started
    started.kill()


@pytest.fixture(scope="module")
def closed(shared_lenet5: Artifact) -> Iterator[Server]:
    """With a token, and another for admin calls."""
    started = Server([f"digits={shared_lenet5.path}"], {"DEPLOY_TOKEN": TOKEN, "DEPLOY_ADMIN_TOKEN": ADMIN})
    yield started
    started.kill()


INFER, LOAD = "/v2/models/digits/infer", "/v2/repository/models/digits/load"


@pytest.mark.parametrize(
    ("path", "token", "status"),
    [
        ("/v2/health/live", None, 200), ("/v2/health/ready", None, 200), ("/v2", None, 401), ("/metrics", None, 401),
        (INFER, None, 401), (INFER, "wrong", 401), (INFER, TOKEN, 200), (INFER, ADMIN, 200), (LOAD, TOKEN, 401), (LOAD, ADMIN, 200),
        ("/v2/repository/index", TOKEN, 401), ("/v2/repository/index", ADMIN, 200),
    ],
)  # fmt: skip
def test_who_may_call_what(closed: Server, path: str, token: str | None, status: int) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = body() if path == INFER else b"" if "repository" in path else None
    found, document, answered = call(closed, path, data, headers)
    assert found == status
    if status == 401:
        assert "token" in document["error"]
        assert answered["WWW-Authenticate"] == "Bearer"
        assert TOKEN not in json.dumps(document)


def test_the_grpc_door_has_the_same_locks(closed: Server) -> None:
    from deploy.serving.grpc_messages import message

    with grpc.insecure_channel(closed.grpc) as channel:

        def ask(method: str, token: str | None) -> Any:
            rpc = channel.unary_unary(
                f"/inference.GRPCInferenceService/{method}", request_serializer=lambda each: each.SerializeToString()
            )
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            try:
                rpc(message(f"inference.{method}Request")(), metadata=metadata, timeout=20)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        assert ask("ServerLive", None) == grpc.StatusCode.OK
        assert ask("ServerMetadata", None) == grpc.StatusCode.UNAUTHENTICATED
        assert ask("ServerMetadata", TOKEN) == grpc.StatusCode.OK
        assert ask("RepositoryIndex", TOKEN) == grpc.StatusCode.UNAUTHENTICATED
        assert ask("RepositoryIndex", ADMIN) == grpc.StatusCode.OK


def test_web_pages_cannot_reach_a_server_of_this_machine(server: Server) -> None:
    status, document, _ = call(server, INFER, body(), {"Host": "evil.example"})
    assert (status, "localhost" in document["error"]) == (403, True)
    status, document, _ = call(server, LOAD, b"", {"Origin": "https://evil.example"})
    assert (status, "web pages" in document["error"]) == (403, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "opens the server to other machines: give it a token"),
        ({"tls_cert": Path("x")}, "go together"),
        ({"http_port": 70000}, "between 0 and 65535"),
        ({"http_port": None, "grpc_port": None}, "both doors are shut"),
    ],
)
def test_options_that_leave_the_server_open_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServerOptions(**options)
    assert ServerOptions(host="0.0.0.0", token=TOKEN)
    assert ServerOptions(host="0.0.0.0", insecure=True)


def test_admin_calls_of_an_open_server_need_a_token_of_their_own() -> None:
    for access in (Access(loopback=False), Access(token=TOKEN)):
        with pytest.raises(RefusedError, match="--admin-token-file"):
            access.check({"authorization": f"Bearer {TOKEN}"}, admin=True)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.2", True), ("::1", True), ("0.0.0.0", False), ("", False), ("localhost.evil.com", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_token_files_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(UsageError, match="cannot read"):
        read_token(file)
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        read_token(file)
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    file.write_text("short")
    with pytest.raises(UsageError, match="16 characters or more"):
        read_token(file)


@pytest.mark.parametrize("packed", [False, True])
def test_a_request_that_is_too_large_is_refused_before_it_is_read_whole(server: Server, packed: bool) -> None:
    plain = b" " * (64 << 20)
    data = gzip.compress(plain) if packed else plain[: 2 << 20]
    before = server.resident_bytes
    status, document, _ = call(server, INFER, data, {"Content-Encoding": "gzip"} if packed else {})
    assert (status, "larger than 1048576 bytes" in document["error"]) == (413, True)
    assert server.resident_bytes - before < 16 << 20


def test_a_body_of_unknown_length_is_counted_while_it_comes(server: Server) -> None:
    host, _, port = server.http.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    with contextlib.closing(connection):
        connection.request(
            "POST", INFER, body=iter([b" " * (1 << 18)] * 8), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
        )
        assert connection.getresponse().status == 413
    assert call(server, "/v2/health/live")[0] == 200


@pytest.mark.parametrize(
    ("data", "encoding", "status"),
    [
        (b"no gzip", "gzip", 400), (gzip.compress(b"{}")[:-4], "gzip", 400), (gzip.compress(b"{}") + b"more", "gzip", 400),
        (zlib.compress(b"{}"), "deflate", 400), (b"{}", "br", 415),
    ],
)  # fmt: skip
def test_compression_that_is_none(server: Server, data: bytes, encoding: str, status: int) -> None:
    found, document, _ = call(server, INFER, data, {"Content-Encoding": encoding})
    assert found == status
    assert document["error"]


def png_of(width: int, height: int) -> bytes:
    """The head of a PNG that says it is so large, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_images_that_are_bombs_or_none_are_refused(server: Server, digits: Path) -> None:
    good = (digits / "0.png").read_bytes()
    classify = "/v2/models/digits/classify"
    assert call(server, classify, good)[0] == 200
    for data, message in (
        (png_of(100_000, 100_000), "pixels"),
        (png_of(2100, 2000), "pixels"),
        (b"GIF89a" + bytes(100), "neither a JPEG nor a PNG"),
        (b"", "neither a JPEG nor a PNG"),
        (good[: len(good) // 2], "cannot be read"),
    ):
        status, document, _ = call(server, classify, data)
        assert (status, message in document["error"]) == (400, True), document
    for query in ("top=0", "top=x", "top=5000", "priority=-1", "timeout=1e9"):
        assert call(server, f"{classify}?{query}", good)[0] == 400
    wide = io.BytesIO()
    Image.new("RGB", (40, 40)).save(wide, "JPEG")
    assert call(server, classify, wide.getvalue())[0] == 200


def test_nothing_is_decoded_to_see_how_large_an_image_is() -> None:
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"too many pixels; 50,000,000 are the most"):
        check_image(png_of(65000, 65000), Limits().image_pixels)
    assert time.perf_counter() - start < 0.5


def test_models_cannot_be_uploaded_or_loaded_from_elsewhere(server: Server) -> None:
    status, document, _ = call(server, LOAD, json.dumps({"parameters": {"config": "{}", "file:1/model.onnx": "aGk="}}).encode())
    assert (status, "nothing is uploaded" in document["error"]) == (403, True)
    assert call(server, "/v2/repository/models/..%2Fother/load", b"")[0] == 404


def test_wrong_methods_and_paths_are_answered_as_the_protocol_wants(server: Server) -> None:
    for path, data, status in (("/v2/models/digits/infer", None, 405), ("/v3", None, 404), ("/v2/health/live", b"", 405)):
        found, document, headers = call(server, path, data)
        assert found == status
        assert document["error"]
        assert headers["X-Request-Id"]
    assert call(server, "/v2", None, {"X-Request-Id": "abc-1"})[2]["X-Request-Id"] == "abc-1"
    assert call(server, "/v2", None, {"X-Request-Id": "a b"})[2]["X-Request-Id"] != "a b"


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


def test_a_port_that_is_taken_is_said(server: Server, shared_lenet5: Artifact) -> None:
    for option, address in (("--http-port", server.http), ("--grpc-port", server.grpc)):
        other = "--no-grpc" if option == "--http-port" else "--no-http"
        done = subprocess.run(
            [sys.executable, "-m", "deploy", "serve", str(shared_lenet5.path), option, address.rpartition(":")[2], other],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "in use" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("text", "message"), [("a b=x", "cannot be the name"), ("n=x@0", "version must be a number from 1")])
def test_names_of_models_are_checked(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelSource.parse(text)


def test_names_and_versions_are_read() -> None:
    assert ModelSource.parse("net=build/some@host/net@12") == ModelSource(
        name="net", path=Path("build/some@host/net"), version="12"
    )
    assert ModelSource.parse("net=build/some@host").version == "1"


def test_slow_and_half_open_clients_hold_nobody_up(shared_lenet5: Artifact, serve: Callable[..., Server]) -> None:
    server = serve(f"digits={shared_lenet5.path}", "--body-timeout", "0.5")
    host, _, port = server.http.partition(":")
    slow = [socket.create_connection((host, int(port)), timeout=20) for _ in range(50)]
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n".encode()
    for number, each in enumerate(slow):
        each.sendall(head[: len(head) // 2] if number % 2 else head + b"{")
    start = time.perf_counter()
    assert call(server, INFER, body())[0] == 200
    assert time.perf_counter() - start < 2
    assert b" 408 " in slow[0].recv(200)
    for each in slow:
        each.close()
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


def test_a_full_queue_says_when_to_come_again(shared_lenet5: Artifact, serve: Callable[..., Server]) -> None:
    server = serve(f"digits={shared_lenet5.path}", "--queue", "4", "--max-batch", "4", "--delay-ms", "400")
    statuses: list[int] = []
    retry: list[str] = []

    def client() -> None:
        status, _, headers = call(server, INFER, body(3))
        statuses.append(status)
        if status == 503:
            retry.append(headers["Retry-After"])

    threads = [threading.Thread(target=client) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(statuses) == {200, 503}
    assert set(retry) == {"1"}
    with urllib.request.urlopen(f"http://{server.http}/metrics") as answer:
        text = answer.read().decode()
    assert f'nv_inference_request_failure{{model="digits",version="1",reason="REJECTED"}} {len(retry)}\n' in text
