"""The number of connections of the REST door, and its addresses."""

import asyncio
import contextlib
import http.client
import json
from typing import Any

import pytest

from deploy.serving.models import ModelOptions, Models
from deploy.serving.options import ServerOptions
from deploy.serving.rest_door import HttpDoor

from .conftest import INFER


def ask(connections: int, held: int, path: str) -> tuple[int, Any, Any]:
    """Status, document and headers of the answer to a client with 2 MiB to send, while `held` other connections are open."""

    async def main() -> tuple[int, Any, Any]:
        options = ServerOptions(http_port=0, grpc_port=None, connections=connections)
        door = await HttpDoor.open(Models([], ModelOptions()), options)
        try:
            return await asyncio.to_thread(talk, *door.address.rpartition("//")[2].split(":"))
        finally:
            await door.close()

    def talk(host: str, port: str) -> tuple[int, Any, Any]:
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=30)))
                for _ in range(held + 1)
            ]
            for client in clients[1:]:
                client.request("GET", "/v2/health/live")
                client.getresponse().read()
            clients[0].request("POST", path, b" " * (2 << 20), {"Connection": "close"})
            answer = clients[0].getresponse()
            return answer.status, json.loads(answer.read()), answer.headers

    return asyncio.run(main())


@pytest.mark.parametrize("path", [INFER, "/v2/health/live"])
def test_a_server_with_too_many_connections_says_so_and_when_to_come_again(path: str) -> None:
    status, document, headers = ask(connections=3, held=2, path=path)
    assert (status, "connections" in document["error"], headers["Retry-After"]) == (503, True, "1")
    assert ask(connections=4, held=2, path=path)[0] in (404, 405)


def test_an_address_that_cannot_be_listened_on_is_named() -> None:
    async def main() -> None:
        await HttpDoor.open(
            Models([], ModelOptions()), ServerOptions(host="192.0.2.1", http_port=8000, grpc_port=None, insecure=True)
        )

    with pytest.raises(OSError, match=r"192\.0\.2\.1:8000"):
        asyncio.run(main())
