"""The frame around every request over REST: access, the request's id, the protocol's form of errors, and the log."""

import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.errors import DeployError, UnavailableError
from deploy.serving.answers import status_of, text_of
from deploy.serving.guard import Access

logger = logging.getLogger("deploy.serving")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ADMIN = re.compile(r"/v2/repository/")
_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")
_OPEN = re.compile(r"/v2/health/(live|ready)")
_RETRY_AFTER_S = "1"

Infer = Callable[[str, str | None, Mapping[str, str], Receive], Awaitable[Response]]


class Guard:
    """The ASGI application that checks access, gives the request an id, turns errors into answers and writes the log.

    `app` answers everything but inference, which goes to `infer` directly: the router's layers would take longer than all other
    work for a small request. `crowded` returns whether there are too many connections to take the request.
    """

    def __init__(self, app: ASGIApp, infer: Infer, access: Access, *, log_requests: bool, crowded: Callable[[], bool]) -> None:
        self._app = app
        self._infer = infer
        self._access = access
        self._log_requests = log_requests
        self._crowded = crowded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        start = time.perf_counter()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = os.urandom(16).hex()
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        path = scope["path"]
        error: str | None = None
        try:
            if not _OPEN.fullmatch(path):
                if self._crowded():
                    raise UnavailableError("the server has as many connections as it takes")
                self._access.check(headers, admin=_ADMIN.match(path) is not None)
            if match := _INFER.fullmatch(path):
                if scope["method"] != "POST":
                    raise HTTPException(405, headers={"Allow": "POST"})
                response = await self._infer(match["model"], match["version"], headers, receive)
                await response(scope, receive, named)
            else:
                scope["app"] = self  # so that the router raises its errors instead of answering them
                await self._app(scope, receive, named)
        except ClientDisconnect:
            error = "the client left"
        except Exception as caught:
            if status:
                raise  # an answer has begun; no other can be sent
            response = error_response(caught)
            error = str(getattr(caught, "detail", caught))
            if response.status_code == 500 and not isinstance(caught, DeployError):
                logger.exception("a bug in the server", extra={"request_id": request_id})
            await response(scope, receive, named)
        if self._log_requests or status >= 500 or status in (401, 403):
            level = logging.ERROR if status >= 500 and status != 503 else logging.INFO
            took_ms = round((time.perf_counter() - start) * 1e3, 3)
            fields = {"request_id": request_id, "method": scope["method"], "path": path, "status": status, "ms": took_ms}
            logger.log(level, "request", extra={**fields, **({"error": error} if error else {})})


def error_response(error: Exception) -> Response:
    """The answer to a request that failed: `{"error": ...}`, with the status that fits the error."""
    status = status_of(error)
    text = text_of(error)
    if isinstance(error, HTTPException):
        return json_response({"error": str(error.detail)}, error.status_code, error.headers)
    headers = {"Retry-After": _RETRY_AFTER_S} if status == 503 else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response({"error": text}, status, headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")
