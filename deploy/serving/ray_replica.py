"""One replica on a Ray cluster: the models, the REST application over them, and the calls of gRPC under the names that Ray looks for."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
from ray import serve as ray_serve
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream
from starlette.types import ASGIApp

from deploy.serving.grpc_frame import Frame, handlers
from deploy.serving.grpc_messages import POOL
from deploy.serving.grpc_service import HEALTH, SERVICE, Service
from deploy.serving.log import log_as_json
from deploy.serving.models import ModelOptions, Models
from deploy.serving.options import ServerOptions
from deploy.serving.rest_app import make_app
from deploy.serving.server import tracing
from deploy.serving.source import ModelSource

SERVICES = "deploy.serving.ray_replica.add_services"
"""What the gRPC doors of Ray call to learn which methods there are."""


def add_services(servicer: Any, server: Any) -> None:
    """Add both services to a gRPC server of Ray's, which passes each call on to the method of that name of a replica."""
    for service in (SERVICE, HEALTH):
        methods = POOL.FindServiceByName(service).methods
        server.add_generic_rpc_handlers((handlers(service, dict.fromkeys((method.name for method in methods), servicer)),))


class Replica:
    """All models of a server, opened when Ray starts the replica."""

    def __init__(self, sources: list[ModelSource], models: ModelOptions, options: ServerOptions) -> None:
        log_as_json()
        self._served = Models(sources, models)
        self._served.load_all()
        self._options = options
        self._trace = tracing(options)
        service = Service(self._served, trace=self._trace, is_alone=False)
        # Ray's gRPC door is open to other machines, whatever the host of the other door.
        access = replace(options.access, loopback=False, replica=True)
        frame = Frame(service, access, options.limits, log_requests=options.log_requests)
        self._calls = {**frame.calls(SERVICE), **frame.calls(HEALTH)}

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_app(
            self._served,
            access=replace(self._options.access, replica=True),
            limits=self._options.limits,
            log_requests=self._options.log_requests,
            replica=str(ray_serve.get_replica_context().replica_tag),
            trace=self._trace,
        )

    async def _answer(self, name: str, data: bytes, context: RayServegRPCContext) -> "_Answer":
        try:
            return _Answer(await self._calls[name](data, _Context(context)))
        except _Aborted:
            return _Answer(b"")  # Ray sends the status in the context

    async def _answers(
        self, name: str, given: bytes | gRPCInputStream[bytes], context: RayServegRPCContext
    ) -> AsyncIterator["_Answer"]:
        async for data in self._calls[name](given, _Context(context)):
            yield _Answer(data)


class _Answer:
    """A message in bytes, in the form in which Ray takes it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:  # noqa: N802  (as messages have it)
        return self._data


class _Aborted(Exception):  # noqa: N818
    """A call has ended with the status in its context."""


class _Context:
    """The context of a call, as `Frame` needs it. Ray does not tell the replicas when a call's time is over: it cancels the call."""

    def __init__(self, context: RayServegRPCContext) -> None:
        self._context = context

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata()

    def time_remaining(self) -> None:
        return None

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self._context.set_code(code)
        self._context.set_details(details)
        raise _Aborted(details)


def _method(name: str, *, is_stream: bool) -> Any:
    """The method of `Replica` that Ray calls for the method `name` of a service."""

    async def answer(self: Replica, data: bytes, grpc_context: RayServegRPCContext) -> _Answer:
        return await self._answer(name, data, grpc_context)

    async def answers(self: Replica, given: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[_Answer]:
        async for each in self._answers(name, given, grpc_context):
            yield each

    return answers if is_stream else answer


for _service in (SERVICE, HEALTH):
    for _each in POOL.FindServiceByName(_service).methods:
        setattr(Replica, _each.name, _method(_each.name, is_stream=_each.server_streaming))
