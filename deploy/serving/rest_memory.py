"""Triton's shared memory extension over REST."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deploy.errors import InputError
from deploy.serving.middleware import json_response
from deploy.serving.regions import Regions, refuse_cuda

_SYSTEM, _CUDA = "/v2/systemsharedmemory", "/v2/cudasharedmemory"
_OF_REGISTER = {"key", "offset", "byte_size"}


def memory_routes(regions: Regions, document: Callable[[Request], Awaitable[dict[str, Any]]]) -> Sequence[Route]:
    """The routes of both kinds of shared memory. document: reads the JSON object in the body of a request."""

    async def status(request: Request) -> Response:
        return json_response([region.to_json() for region in regions.status(request.path_params.get("region", ""))])

    async def register(request: Request) -> Response:
        asked = await document(request)
        if unknown := asked.keys() - _OF_REGISTER:
            raise InputError(f"{min(unknown)!r} is not known; expected key, byte_size and offset")
        regions.register(request.path_params["region"], asked.get("key"), asked.get("offset", 0), asked.get("byte_size"))
        return json_response({})

    async def unregister(request: Request) -> Response:
        await document(request)
        regions.unregister(request.path_params.get("region", ""))
        return json_response({})

    async def no_regions(request: Request) -> Response:
        return json_response([])

    async def refuse(request: Request) -> Response:
        raise refuse_cuda()

    async def nothing(request: Request) -> Response:
        await document(request)
        return json_response({})

    routes = []
    for base, look, take, leave in ((_SYSTEM, status, register, unregister), (_CUDA, no_regions, refuse, nothing)):
        routes.append(Route(f"{base}/region/{{region}}/register", take, methods=["POST"]))
        for of in (base, f"{base}/region/{{region}}"):
            routes += [Route(f"{of}/status", look, methods=["GET"]), Route(f"{of}/unregister", leave, methods=["POST"])]
    return routes
