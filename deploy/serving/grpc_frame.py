"""The frame around every call over gRPC: access, the status of an error, and the log; and grpc's handlers of the calls."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc

from deploy.errors import DeadlineError, DeployError, RefusedError
from deploy.serving import answers
from deploy.serving.grpc_large import read_request
from deploy.serving.grpc_messages import POOL, message, read_message
from deploy.serving.grpc_service import ADMIN, OPEN, Service, metadata
from deploy.serving.grpc_stream import in_order
from deploy.serving.guard import Access, Limits

logger = logging.getLogger("deploy.serving")

_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


_MOST_DOCUMENT = 1 << 20
"""Bytes of a request without tensors, which is read in the event loop."""


class _EndStream(Exception):  # noqa: N818
    """A bug has ended a stream: the status and the text for its client. It is in the log already."""


class Frame:
    """The calls of both services, of bytes to bytes: gRPC itself would answer UNKNOWN to bytes that are not a message.

    A call takes the request (or the requests of a stream) and a context with `invocation_metadata`, `time_remaining` and `abort`, as
    `grpc.aio.ServicerContext` has them.
    """

    def __init__(self, service: Service, access: Access, limits: Limits, *, log_requests: bool) -> None:
        self._service = service
        self._access = access
        self._log_requests = log_requests
        self._most_bytes = limits.request_bytes

    def calls(self, service: str) -> dict[str, Any]:
        """The calls of a service, by the names of its methods."""
        made: dict[str, Any] = {}
        for method in POOL.FindServiceByName(service).methods:
            kind = message(method.input_type.full_name)
            if method.client_streaming:
                made[method.name] = self._infer_stream
            elif method.name == "ModelInfer":
                made[method.name] = self._infer
            elif method.server_streaming:
                made[method.name] = self._guarded_stream(method.name, getattr(self._service, method.name), kind)
            else:
                made[method.name] = self._guarded(method.name, getattr(self._service, method.name), kind)
        return made

    def _check(self, name: str, context: Any, size: int) -> None:
        if name not in OPEN:
            self._access.check({"authorization": metadata(context).get("authorization", "")}, admin=name in ADMIN)
        self._check_size(size, self._most_bytes if name == "ModelInfer" else min(self._most_bytes, _MOST_DOCUMENT))

    def _check_size(self, size: int, most: int) -> None:
        if size > most:
            raise RefusedError(413, f"the request is larger than {most} bytes, which is all that is taken")

    def _guarded(self, name: str, call: Callable[..., Any], kind: Any) -> Any:
        async def guarded(data: bytes, context: Any) -> bytes:
            start = time.perf_counter()
            try:
                self._check(name, context, len(data))
                answer = await call(read_message(kind, data), context)
            except Exception as error:
                await context.abort(*self._failed(name, start, error))
            self._log(name, start, grpc.StatusCode.OK)
            return bytes(answer.SerializeToString())

        return guarded

    def _guarded_stream(self, name: str, call: Callable[..., Any], kind: Any) -> Any:
        async def guarded(data: bytes, context: Any) -> AsyncIterator[bytes]:
            start = time.perf_counter()
            try:
                self._check(name, context, len(data))
                async for answer in call(read_message(kind, data), context):
                    yield answer.SerializeToString()
            except Exception as error:
                await context.abort(*self._failed(name, start, error))

        return guarded

    async def _infer(self, data: bytes, context: Any) -> bytes:
        """`ModelInfer`."""
        name, start, request_id = "ModelInfer", time.perf_counter(), ""
        answer = message("inference.ModelInferResponse")()
        try:
            self._check(name, context, len(data))
            received = await read_request(data)
            del data
            request_id = received.message.id
            is_large = await self._service.infer(received, context, answer)
        except Exception as error:
            await context.abort(*self._failed(name, start, error, request_id))
        self._log(name, start, grpc.StatusCode.OK, request_id)
        return await _written(answer, is_large)

    async def _infer_stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """`ModelStreamInfer`: an error of one request is its answer, and the stream goes on."""
        name, start = "ModelStreamInfer", time.perf_counter()
        try:
            self._check(name, context, 0)
            answered = in_order(
                requests,
                lambda data: self._streamed(name, data, context),
                closing=self._service.closing,
                most_bytes=self._most_bytes,
            )
            async with contextlib.aclosing(answered):
                async for response in answered:
                    yield response
        except _EndStream as end:
            await context.abort(*end.args)
        except Exception as error:
            await context.abort(*self._failed(name, start, error))

    async def _streamed(self, name: str, data: bytes, context: Any) -> bytes:
        """The answer to one request of a stream."""
        start, is_large = time.perf_counter(), False
        self._check_size(len(data), self._most_bytes)  # where the door does not see to it
        received = await read_request(data)  # what is no request ends the stream
        del data
        request_id = received.message.id
        response = message("inference.ModelStreamInferResponse")()
        try:
            is_large = await self._service.infer(received, context, response.infer_response, is_stream=True)
            self._log(name, start, grpc.StatusCode.OK, request_id)
        except Exception as error:
            code, text = self._failed(name, start, error, request_id)
            if not isinstance(error, DeployError):
                raise _EndStream(code, text) from error
            response = message("inference.ModelStreamInferResponse")(error_message=text)
            response.infer_response.id = request_id
        response.infer_response.parameters["triton_final_response"].bool_param = True
        return await _written(response, is_large)

    def _failed(self, name: str, start: float, error: Exception, request_id: str = "") -> tuple[Any, str]:
        """The status and the text that the client gets for an error, which goes into the log."""
        code = _code_of(error)
        self._log(name, start, code, request_id, error)
        return code, answers.text_of(error)

    def _log(self, name: str, start: float, code: Any, request_id: str = "", error: Exception | None = None) -> None:
        unexpected = error is not None and not isinstance(error, DeployError)
        if not (self._log_requests or unexpected or code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAUTHENTICATED)):
            return
        took_ms = round((time.perf_counter() - start) * 1e3, 3)
        level = logging.ERROR if code == grpc.StatusCode.INTERNAL else logging.INFO
        extra = {"method": name, "status": code.name, "ms": took_ms}
        extra |= {key: value for key, value in (("request_id", request_id), ("error", error and str(error))) if value}
        logger.log(level, "rpc", extra=extra, exc_info=error if unexpected else None)


def handlers(service: str, calls: Mapping[str, Any]) -> Any:
    """grpc's handler of a service whose methods are `calls`, of bytes to bytes."""
    made = {}
    for method in POOL.FindServiceByName(service).methods:
        if method.client_streaming:
            make = grpc.stream_stream_rpc_method_handler
        else:
            make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        made[method.name] = make(calls[method.name])
    return grpc.method_handlers_generic_handler(service, made)


async def _written(answer: Any, is_large: bool) -> bytes:
    return await asyncio.to_thread(answer.SerializeToString) if is_large else answer.SerializeToString()


def _code_of(error: Exception) -> Any:
    """The gRPC status of an error."""
    if isinstance(error, DeadlineError):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return _STATUS.get(answers.status_of(error), grpc.StatusCode.INTERNAL)
