"""The number of connections of the REST door, and its addresses."""

import asyncio
import contextlib
import http.client
import json
import select
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from deploy.serving.guard import Limits
from deploy.serving.models import ModelOptions, Models
from deploy.serving.options import ServerOptions
from deploy.serving.rest_door import HttpDoor


def talk_to(talk: Callable[[str, int], Any], **options: Any) -> Any:
    """What `talk` returns, called in a thread with the host and port of a door without models."""

    async def main() -> Any:
        door = await HttpDoor.open(Models([], ModelOptions()), ServerOptions(http_port=0, grpc_port=None, **options))
        try:
            host, port = door.address.rpartition("//")[2].split(":")
            return await asyncio.to_thread(talk, host, int(port))
        finally:
            await door.close()

    return asyncio.run(main())


def ask(host: str, port: int, path: str) -> tuple[int, Any, Any]:
    """Status, document and headers of the answer to a request on a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=30)) as client:
        client.request("GET", path, headers={"Connection": "close"})
        answer = client.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers


def test_connections_that_are_idle_keep_nobody_out() -> None:
    def talk(host: str, port: int) -> None:
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(socket.create_connection((host, port), 5)) for _ in range(20)]
            assert ask(host, port, "/v2")[0] == 200
            silent[0].settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert silent[0].recv(1) == b"", "the longest idle has been closed"
            silent[-1].sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert silent[-1].recv(100).startswith(b"HTTP/1.1 200 "), "the newest has not"

    talk_to(talk, connections=8)


def test_while_all_connections_are_busy_health_is_answered_and_others_are_told_to_come_again() -> None:
    def talk(host: str, port: int) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(4):  # requests whose bodies are on their way
                busy = stack.enter_context(socket.create_connection((host, port), 5))
                busy.sendall(b"POST /v2/repository/index HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.2)
            assert ask(host, port, "/v2/health/live")[0] == 200
            status, document, headers = ask(host, port, "/v2")
            assert (status, "connections" in document["error"], headers["Retry-After"]) == (503, True, "1")

    talk_to(talk, connections=4, limits=Limits(body_s=1))


@pytest.mark.parametrize(("keep_alive_s", "is_open"), [(0.2, False), (30.0, True)])
def test_a_connection_without_a_request_is_kept_for_as_long_as_was_said(keep_alive_s: float, is_open: bool) -> None:
    def talk(host: str, port: int) -> None:
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=30)) as client:
            client.request("GET", "/v2")
            client.getresponse().read()
            assert bool(select.select([client.sock], [], [], 1)[0]) is not is_open

    talk_to(talk, keep_alive_s=keep_alive_s)


def test_an_address_that_cannot_be_listened_on_is_named() -> None:
    async def main() -> None:
        await HttpDoor.open(
            Models([], ModelOptions()), ServerOptions(host="192.0.2.1", http_port=8000, grpc_port=None, insecure=True)
        )

    with pytest.raises(OSError, match=r"192\.0\.2\.1:8000"):
        asyncio.run(main())
