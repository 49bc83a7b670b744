"""Answers that are sent before the request's body has arrived: the client sees them, and cannot hold the connection."""

import asyncio
import http.client
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from deploy.serving.guard import Limits
from deploy.serving.lingering import Lingering
from deploy.serving.models import ModelOptions, Models
from deploy.serving.options import ServerOptions
from deploy.serving.rest_door import HttpDoor

from .conftest import INFER, Server

MIB = 1 << 20
CLASSIFY, INDEX = "/v2/models/digits/classify", "/v2/repository/index"
PIECE = b" " * (1 << 16)


class Client:
    """A client that sends its whole request, however long that takes, before it reads a byte of the answer."""

    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)

    def head(self, method: str, path: str, headers: dict[str, str]) -> None:
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in ({"Host": "localhost"} | headers).items())]
        self.socket.sendall("\r\n".join((*lines, "", "")).encode())

    def send(self, size: int, *, chunked: bool = False) -> None:
        for _ in range(size // len(PIECE)):
            self.socket.sendall(b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if chunked else PIECE)

    def wait_for_the_answer(self) -> None:
        """Return when a byte of the answer is there; nothing is read."""
        assert select.select([self.socket], [], [], 20)[0], "no answer"

    def read(self) -> tuple[int, Any]:
        """Status and JSON of the answer, behind which the server must have closed the connection in an orderly way."""
        answer = http.client.HTTPResponse(self.socket)
        answer.begin()
        document = json.loads(answer.read())
        assert answer.headers["Connection"] == "close"
        assert self.socket.recv(1) == b"", "there is more behind the answer"
        return answer.status, document


@contextmanager
def client_of(address: str) -> Iterator[Client]:
    client = Client(address)
    with client.socket:
        yield client


EARLY = {
    "too large": (413, "POST", INFER, {}),
    "too large, by the bytes that came": (413, "POST", INFER, {"Transfer-Encoding": "chunked"}),
    "body of an image too large": (413, "POST", CLASSIFY, {}),
    "encoding": (415, "POST", INFER, {"Content-Encoding": "br", "Transfer-Encoding": "chunked"}),
    "damaged gzip": (400, "POST", INFER, {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}),
    "header length": (400, "POST", INFER, {"Inference-Header-Content-Length": "x"}),
    "query": (400, "POST", f"{CLASSIFY}?top=0", {}),
    "foreign host": (403, "POST", INFER, {"Host": "evil.example"}),
    "web page": (403, "POST", INDEX, {"Origin": "https://evil.example"}),
    "unknown model": (404, "POST", "/v2/models/nobody/infer", {}),
    "wrong path": (404, "POST", "/v3", {}),
    "wrong method": (405, "PUT", INFER, {}),
    "wrong method of a route": (405, "POST", "/v2/health/live", {}),
    "no refusal: a GET with a body": (200, "GET", "/v2", {}),
}


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize("kind", EARLY)
def test_a_client_that_is_still_sending_sees_the_answer(limited: Server, kind: str, connection: str) -> None:
    status, method, path, headers = EARLY[kind]
    chunked = "Transfer-Encoding" in headers
    size = 4 * MIB
    with client_of(limited.http) as client:
        client.head(method, path, {**({} if chunked else {"Content-Length": str(size)}), "Connection": connection, **headers})
        client.send(5 * MIB // 4, chunked=chunked)
        client.wait_for_the_answer()
        for _ in range(11):  # and goes on for a while, as a client on a slow line does
            time.sleep(0.03)
            client.send(MIB // 4, chunked=chunked)
        if chunked:
            client.socket.sendall(b"0\r\n\r\n")
        answered, document = client.read()
    assert answered == status
    assert ("error" in document) == (status >= 400)


def test_a_client_without_a_token_sees_the_answer(closed: Server) -> None:
    for path in (INFER, INDEX, "/v2", "/v2/models/nobody/infer"):
        with client_of(closed.http) as client:
            client.head("POST", path, {"Content-Length": str(2 * MIB), "Connection": "close"})
            client.wait_for_the_answer()
            client.send(2 * MIB)
            status, document = client.read()
        assert status in (401, 403)
        assert "token" in document["error"]


def test_a_client_that_is_too_slow_sees_the_answer() -> None:
    async def main() -> tuple[int, Any]:
        options = ServerOptions(http_port=0, grpc_port=None, limits=Limits(body_s=0.3))
        door = await HttpDoor.open(Models([], ModelOptions()), options)
        try:
            return await asyncio.to_thread(talk, door.address.rpartition("//")[2])
        finally:
            await door.close()

    def talk(address: str) -> tuple[int, Any]:
        with client_of(address) as client:
            client.head("POST", INDEX, {"Content-Length": str(MIB), "Connection": "close"})
            client.send(MIB // 2)
            client.wait_for_the_answer()
            client.send(MIB // 2)
            return client.read()

    status, document = asyncio.run(main())
    assert (status, document["error"]) == (408, "the body did not come within 0.3 s")


def test_a_connection_whose_request_came_whole_is_kept(limited: Server) -> None:
    """Closing is for bodies that are still on the way: a refusal of a small request costs no connection."""
    with client_of(limited.http) as client:
        for path, status in (("/v3", 404), (INFER, 400), ("/v2/models/nobody/infer", 404), ("/v2/health/live", 405)):
            client.socket.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            answer = http.client.HTTPResponse(client.socket)
            answer.begin()
            assert "error" in json.loads(answer.read())
            assert (answer.status, answer.headers["Connection"]) == (status, None)


def test_a_client_that_asks_first_is_not_told_to_send(limited: Server) -> None:
    with client_of(limited.http) as client:
        client.head("POST", "/v3", {"Content-Length": str(2 * MIB), "Expect": "100-continue"})
        client.wait_for_the_answer()
        assert client.socket.recv(1 << 16).startswith(b"HTTP/1.1 404 ")


# The bounds, on a server whose times are short.

SECONDS, MOST_BYTES = 0.6, 8 * MIB
SLACK_S = 5.0
"""How much longer than the bound a busy machine may take."""


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers 401 and reads nothing."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"15")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"error": "no"}'})


@pytest.fixture(scope="module", params=["httptools", "h11"])
def refusing(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that refuses everything at once, with each of uvicorn's two protocols."""
    app = Lingering(refuse, seconds=SECONDS, most_bytes=MOST_BYTES)
    running = uvicorn.Server(uvicorn.Config(app, http=request.param, log_level="critical", lifespan="off", loop="asyncio"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        running.should_exit = True
        thread.join(20)


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_both_protocols_of_uvicorn_let_the_answer_through(refusing: str, connection: str) -> None:
    with client_of(refusing) as client:
        client.head("POST", "/", {"Content-Length": str(2 * MIB), "Connection": connection})
        client.wait_for_the_answer()
        for _ in range(8):
            time.sleep(0.02)
            client.send(MIB // 4)
        assert client.read() == (401, {"error": "no"})


def silent(client: Client) -> None:
    client.socket.settimeout(SECONDS + SLACK_S)
    while client.socket.recv(1 << 16):
        pass
    raise ConnectionResetError("the server closed the connection")


def dripping(client: Client) -> None:
    while True:
        client.socket.sendall(b" ")
        time.sleep(0.02)


def flooding(client: Client) -> None:
    while True:
        client.socket.sendall(PIECE)


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize("behaviour", [silent, dripping, flooding])
def test_a_client_that_never_ends_is_cut_off_in_time(refusing: str, behaviour: Callable[[Client], None], connection: str) -> None:
    with client_of(refusing) as client:
        client.head("POST", "/", {"Content-Length": str(1 << 40), "Connection": connection})
        client.wait_for_the_answer()
        start = time.monotonic()
        client.socket.settimeout(SECONDS + SLACK_S)
        with pytest.raises(ConnectionError):
            behaviour(client)
        assert time.monotonic() - start < SECONDS + SLACK_S


def test_no_more_is_read_than_the_bound_in_bytes() -> None:
    """Counted at the application, for buffers of the kernel hide what the server itself takes."""
    taken = 0

    async def receive() -> Any:
        nonlocal taken
        taken += len(PIECE)
        return {"type": "http.request", "body": PIECE, "more_body": True}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"content-length", b"%d" % (1 << 40))]}
    asyncio.run(Lingering(refuse, seconds=60, most_bytes=MOST_BYTES)(scope, receive, send))
    assert MOST_BYTES <= taken <= MOST_BYTES + 2 * len(PIECE)
    assert [message.get("more_body") for message in sent] == [None, True, False]


def test_the_end_of_the_body_ends_the_wait() -> None:
    messages = [{"body": PIECE, "more_body": True}] * 3 + [{"body": b""}]

    async def receive() -> Any:
        return {"type": "http.request", **messages.pop(0)}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "headers": [(b"transfer-encoding", b"chunked")]}
    asyncio.run(Lingering(refuse)(scope, receive, send))
    assert not messages


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"0")]])
def test_a_request_without_a_body_is_answered_at_once(headers: list[tuple[bytes, bytes]]) -> None:
    async def receive() -> Any:
        raise AssertionError("there is nothing to wait for")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Lingering(refuse)({"type": "http", "headers": headers}, receive, send))
    assert len(sent) == 2
    assert (b"connection", b"close") not in sent[0]["headers"]
