"""The gRPC door: Open Inference Protocol v2, Triton's extensions, and gRPC's health checks."""

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import json_format

from deploy.errors import DeadlineError, DeployError, ModelNotFoundError, RefusedError, UnavailableError
from deploy.serving import answers
from deploy.serving.grpc_messages import POOL, build_response, message, parse_request, read_message
from deploy.serving.guard import Access
from deploy.serving.models import Models
from deploy.serving.options import ServerOptions
from deploy.version import __version__

logger = logging.getLogger("deploy.serving")

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"

_ADMIN = {"RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"}
_OPEN = {"ServerLive", "ServerReady", "Check", "Watch"}
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    503: grpc.StatusCode.UNAVAILABLE,
}
_WATCH_S = 0.2


class GrpcDoor:
    """A running server for gRPC."""

    name = "grpc"

    def __init__(self, server: Any, address: str, drain_s: float) -> None:
        self._server = server
        self.address = address
        self._drain_s = drain_s

    @classmethod
    async def open(cls, models: Models, options: ServerOptions) -> "GrpcDoor":
        """Start the server. Raises OSError if the port is taken."""
        most = options.limits.request_bytes
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", most),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ]
        )
        door = _Door(models, options.access, log_requests=options.log_requests)
        server.add_generic_rpc_handlers((door.handlers(SERVICE), door.handlers(HEALTH)))
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{host}:{options.grpc_port}"
        try:
            if options.tls_cert is not None and options.tls_key is not None:
                pair = (options.tls_key.read_bytes(), options.tls_cert.read_bytes())
                port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(98, "Address already in use", address) from error
        await server.start()
        return cls(server, f"{host}:{port}", options.drain_s)

    async def close(self) -> None:
        """Accept no more requests, and wait for those that have been accepted."""
        await self._server.stop(self._drain_s)


class _Door:
    """The methods of both services, under the names that they have in the protocol."""

    def __init__(self, models: Models, access: Access, *, log_requests: bool) -> None:
        self._models = models
        self._access = access
        self._log_requests = log_requests

    def handlers(self, service: str) -> Any:
        # The handlers take bytes and parse them: gRPC itself would answer UNKNOWN to bytes that are not a message.
        methods = {}
        for method in POOL.FindServiceByName(service).methods:
            read = functools.partial(read_message, message(method.input_type.full_name))
            writes = message(method.output_type.full_name).SerializeToString
            call = getattr(self, method.name)
            if method.client_streaming:
                handler = grpc.stream_stream_rpc_method_handler(
                    self._guarded_stream(method.name, call, functools.partial(_each, read)), None, writes
                )
            elif method.server_streaming:
                handler = grpc.unary_stream_rpc_method_handler(self._guarded_stream(method.name, call, read), None, writes)
            else:
                handler = grpc.unary_unary_rpc_method_handler(self._guarded(method.name, call, read), None, writes)
            methods[method.name] = handler
        return grpc.method_handlers_generic_handler(service, methods)

    def _check(self, name: str, context: Any) -> None:
        if name not in _OPEN:
            headers = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
            self._access.check({"authorization": headers.get("authorization", "")}, admin=name in _ADMIN)

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

    # The server, the models and their state.

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return message("inference.ServerLiveResponse")(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return message("inference.ServerReadyResponse")(ready=self._models.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        ready = True
        try:
            self._models.get(request.name, request.version)
        except UnavailableError:
            ready = False
        return message("inference.ModelReadyResponse")(ready=ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return message("inference.ServerMetadataResponse")(name="deploy", version=__version__, extensions=answers.EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        served = self._models.get(request.name, request.version)
        return message("inference.ModelMetadataResponse")(**answers.metadata(served, self._models.versions(request.name)))

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        served = self._models.get(request.name, request.version)
        return json_format.ParseDict({"config": answers.config(served)}, message("inference.ModelConfigResponse")())

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        names = [request.name] if request.name else self._models.names
        listed = [
            self._models.get(name, version)
            for name in names
            for version in ([request.version] if request.version else self._models.versions(name) or [""])
        ]
        stats = [answers.statistics(served) for served in listed]
        return json_format.ParseDict({"model_stats": stats}, message("inference.ModelStatisticsResponse")())

    async def Check(self, request: Any, context: Any) -> Any:
        status = self._status(request.service)
        if status == "SERVICE_UNKNOWN":
            raise ModelNotFoundError(f"unknown service {request.service!r}")
        return message("grpc.health.v1.HealthCheckResponse")(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        last = None
        while True:
            status = self._status(request.service)
            if status != last:
                yield message("grpc.health.v1.HealthCheckResponse")(status=status)
                last = status
            await asyncio.sleep(_WATCH_S)

    def _status(self, service: str) -> str:
        if service in ("", SERVICE):
            return "SERVING" if self._models.ready else "NOT_SERVING"
        try:
            self._models.get(service)
        except ModelNotFoundError:
            return "SERVICE_UNKNOWN"
        except UnavailableError:
            return "NOT_SERVING"
        return "SERVING"

    # Admin.

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        entries = [entry for entry in self._models.index() if not request.ready or entry["state"] == "READY"]
        return message("inference.RepositoryIndexResponse")(models=entries)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        if request.parameters:
            raise RefusedError(403, "a model is loaded from the path that the server was started with; nothing is uploaded")
        await asyncio.to_thread(self._models.load, request.model_name)
        return message("inference.RepositoryModelLoadResponse")()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await asyncio.to_thread(self._models.unload, request.model_name)
        return message("inference.RepositoryModelUnloadResponse")()

    # Inference.

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        served = self._models.get(request.model_name, request.model_version)
        asked = parse_request(request, served)
        timeout_s = asked.timeout_s
        left = context.time_remaining() if context is not None else None
        if left is not None:  # nobody waits for a later answer
            timeout_s = left if timeout_s is None else min(left, timeout_s)
        used, results = await self._models.infer(
            served, asked.feed, pinned=bool(request.model_version), priority=asked.priority, timeout_s=timeout_s
        )
        return build_response(used, asked, results)

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        name, answer = "ModelStreamInfer", message("inference.ModelStreamInferResponse")
        async for request in requests:
            start = time.perf_counter()
            try:
                response = answer(infer_response=await self.ModelInfer(request, None))
                self._log(name, start, grpc.StatusCode.OK, request.id)
            except Exception as error:
                code, text = self._failed(name, start, error, request.id)
                if not isinstance(error, DeployError):
                    await context.abort(code, text)
                response = answer(error_message=text)
                response.infer_response.id = request.id
            yield response


async def _each(read: Callable[[bytes], Any], requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for data in requests:
        yield read(data)


def _code_of(error: Exception) -> Any:
    """The gRPC status of an error."""
    if isinstance(error, DeadlineError):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return _STATUS.get(answers.status_of(error), grpc.StatusCode.INTERNAL)
