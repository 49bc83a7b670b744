"""The gRPC door: the methods of `grpc_service` behind the rules of access, with statuses for errors and the log."""

import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from deploy.errors import DeadlineError, DeployError
from deploy.serving import answers
from deploy.serving.address import check_address
from deploy.serving.grpc_messages import POOL, message, read_message
from deploy.serving.grpc_service import ADMIN, HEALTH, OPEN, SERVICE, Service, metadata
from deploy.serving.grpc_stream import in_order
from deploy.serving.models import Models
from deploy.serving.options import ServerOptions
from deploy.serving.regions import NO_REGIONS, Regions
from deploy.serving.stages import Trace

logger = logging.getLogger("deploy.serving")

_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_HANDSHAKE_S = 20


class GrpcDoor:
    """A running server for gRPC."""

    name = "grpc"

    def __init__(self, server: Any, service: Service, address: str, drain_s: float) -> None:
        self._server = server
        self._service = service
        self.address = address
        self._drain_s = drain_s

    @classmethod
    async def open(
        cls, models: Models, options: ServerOptions, regions: Regions = NO_REGIONS, trace: Trace | None = None
    ) -> "GrpcDoor":
        """Start the server. Raises OSError if the port is taken."""
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", options.limits.request_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.max_connection_idle_ms", round(options.keep_alive_s * 1e3)),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_S * 1000),
            ]
        )
        service = Service(models, regions, trace)
        frame = Frame(service, options)
        server.add_generic_rpc_handlers((frame.handlers(SERVICE), frame.handlers(HEALTH)))
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{host}:{options.grpc_port}"
        check_address(options.host, options.grpc_port or 0)
        try:
            if options.tls_cert is not None and options.tls_key is not None:
                pair = (options.tls_key.read_bytes(), options.tls_cert.read_bytes())
                port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                port = server.add_insecure_port(address)
        except RuntimeError as error:  # taken since it was checked
            raise OSError(98, "Address already in use", address) from error
        await server.start()
        return cls(server, service, f"{host}:{port}", options.drain_s)

    async def close(self) -> None:
        """Accept no more requests, end the streams, and wait for the requests that have been accepted."""
        self._service.closing.set()
        await self._server.stop(self._drain_s)


class _EndStream(Exception):  # noqa: N818
    """A bug has ended a stream: the status and the text for its client. It is in the log already."""


class Frame:
    """The frame around every call: access, the status of an error, and the log."""

    def __init__(self, service: Service, options: ServerOptions) -> None:
        self._service = service
        self._access = options.access
        self._log_requests = options.log_requests
        self._most_bytes = options.limits.request_bytes

    def handlers(self, service: str) -> Any:
        # The handlers take bytes and parse them: gRPC itself would answer UNKNOWN to bytes that are not a message.
        methods = {}
        for method in POOL.FindServiceByName(service).methods:
            read = functools.partial(read_message, message(method.input_type.full_name))
            writes = message(method.output_type.full_name).SerializeToString
            if method.client_streaming:
                handler = grpc.stream_stream_rpc_method_handler(self._infer_stream, None, writes)
                methods[method.name] = handler
                continue
            call = getattr(self._service, method.name)
            if method.server_streaming:
                handler = grpc.unary_stream_rpc_method_handler(self._guarded_stream(method.name, call, read), None, writes)
            else:
                handler = grpc.unary_unary_rpc_method_handler(self._guarded(method.name, call, read), None, writes)
            methods[method.name] = handler
        return grpc.method_handlers_generic_handler(service, methods)

    def _check(self, name: str, context: Any) -> None:
        if name not in OPEN:
            self._access.check({"authorization": metadata(context).get("authorization", "")}, admin=name in ADMIN)

    def _guarded(self, name: str, call: Callable[[Any, Any], Awaitable[Any]], read: Callable[[bytes], Any]) -> Any:
        async def guarded(data: bytes, context: Any) -> Any:
            start, request_id = time.perf_counter(), ""
            try:
                self._check(name, context)
                request = read(data)
                request_id = getattr(request, "id", "")
                answer = await call(request, context)
            except Exception as error:
                await context.abort(*self._failed(name, start, error, request_id))
            self._log(name, start, grpc.StatusCode.OK, request_id)
            return answer

        return guarded

    def _guarded_stream(self, name: str, call: Callable[[Any, Any], AsyncIterator[Any]], read: Callable[[Any], Any]) -> Any:
        async def guarded(data: Any, context: Any) -> AsyncIterator[Any]:
            start = time.perf_counter()
            try:
                self._check(name, context)
                async for answer in call(read(data), context):
                    yield answer
            except grpc.aio.AbortError:  # the method has logged the error and ended the call
                raise
            except Exception as error:
                await context.abort(*self._failed(name, start, error))

        return guarded

    async def _infer_stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        """`ModelStreamInfer`: an error of one request is its answer, and the stream goes on."""
        name, made = "ModelStreamInfer", message("inference.ModelStreamInferResponse")

        async def answer(data: bytes) -> Any:
            start = time.perf_counter()
            request = read_message(message("inference.ModelInferRequest"), data)
            try:
                response = made(infer_response=await self._service.infer(request, context, is_stream=True))
                self._log(name, start, grpc.StatusCode.OK, request.id)
            except Exception as error:
                code, text = self._failed(name, start, error, request.id)
                if not isinstance(error, DeployError):
                    raise _EndStream(code, text) from error
                response = made(error_message=text)
                response.infer_response.id = request.id
            response.infer_response.parameters["triton_final_response"].bool_param = True
            return response

        start = time.perf_counter()
        try:
            self._check(name, context)
            answered = in_order(requests, answer, closing=self._service.closing, most_bytes=self._most_bytes)
            async with contextlib.aclosing(answered):
                async for response in answered:
                    yield response
        except _EndStream as end:
            await context.abort(*end.args)
        except Exception as error:
            await context.abort(*self._failed(name, start, error))

    def _failed(self, name: str, start: float, error: Exception, request_id: str = "") -> tuple[Any, str]:
        """The status and the text that the client gets for an error, which goes into the log."""
        code = _code_of(error)
        self._log(name, start, code, request_id, error)
        return code, answers.text_of(error)

    def _log(self, name: str, start: float, code: Any, request_id: str, error: Exception | None = None) -> None:
        unexpected = error is not None and not isinstance(error, DeployError)
        if not (self._log_requests or unexpected or code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAUTHENTICATED)):
            return
        took_ms = round((time.perf_counter() - start) * 1e3, 3)
        level = logging.ERROR if code == grpc.StatusCode.INTERNAL else logging.INFO
        extra = {"method": name, "status": code.name, "ms": took_ms}
        extra |= {key: value for key, value in (("request_id", request_id), ("error", error and str(error))) if value}
        logger.log(level, "rpc", extra=extra, exc_info=error if unexpected else None)


def _code_of(error: Exception) -> Any:
    """The gRPC status of an error."""
    if isinstance(error, DeadlineError):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return _STATUS.get(answers.status_of(error), grpc.StatusCode.INTERNAL)
