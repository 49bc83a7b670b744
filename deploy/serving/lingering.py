"""The lingering close: after an answer that did not wait for the request's body, the rest of the body is read and thrown away.

A server that closes a connection while the client is still sending resets it, and the client meets a broken pipe in place of the
answer (RFC 9112, section 9.6). So the connection stays open until the client has finished, within bounds; nginx's directive
`lingering_close` does the same.
"""

import asyncio
import contextlib
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_S = 5.0
"""How long after the answer the connection is closed at the latest, in seconds."""

LINGER_BYTES = 96 << 20
"""How much is thrown away at most: half as much again as the largest request that a server takes by default."""


class Lingering:
    """An ASGI application that holds back the end of an early answer of another one until the body of the request has arrived.

    The client gets the whole answer at once, with `Connection: close`. That its end is held back keeps uvicorn, with either of its
    two protocols, from closing the connection, and from reading on without a bound when the connection is kept alive.
    `app` must not read the body after it began to answer.
    """

    def __init__(self, app: ASGIApp, *, seconds: float = LINGER_S, most_bytes: int = LINGER_BYTES) -> None:
        self._app = app
        self._seconds = seconds
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(scope["headers"], receive)
        early = False

        async def answer(message: Message) -> None:
            nonlocal early
            if message["type"] == "http.response.start":
                early = not await body.has_arrived()
                if early:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif early:
                message = {**message, "more_body": True}
            await send(message)

        await self._app(scope, body.receive, answer)
        if early:
            with contextlib.suppress(TimeoutError):  # the client had its time
                async with asyncio.timeout(self._seconds):
                    await body.discard(self._most_bytes)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Body:
    """The body of one request, and whether its end has been received."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> None:
        self._headers = headers
        self._receive = receive
        self._ended = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def has_arrived(self) -> bool:
        """Whether the whole body has been received. The part that is in the buffer is read first, without waiting."""
        if self._ended:
            return True
        headers = dict(self._headers)
        if b"transfer-encoding" not in headers and not headers.get(b"content-length", b"").strip(b"0"):
            return True
        if b"expect" not in headers:  # to read would ask a client that waits for "100 Continue" to send its body
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await self.receive()
        return self._ended

    async def discard(self, most_bytes: int) -> None:
        """Read on to the end of the body, the client's leaving, or `most_bytes`."""
        taken = 0
        while not self._ended and taken < most_bytes:
            taken += len((await self.receive()).get("body", b""))
