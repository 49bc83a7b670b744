"""The REST door: Open Inference Protocol v2, Triton's extensions, images to classify, segment and find boxes in, metrics."""

import asyncio
import base64
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive

from deploy.data.images import image_input
from deploy.errors import InputError, RefusedError, UnavailableError
from deploy.evaluation.classifier import class_scores, likeliest
from deploy.evaluation.detector import boxes_json
from deploy.evaluation.segmenter import shares
from deploy.evaluation.tasks import Task
from deploy.serving import answers, metrics
from deploy.serving.body import compress, in_time, read_body
from deploy.serving.guard import Access, Limits
from deploy.serving.images import Ran, check_task, image_feed
from deploy.serving.lingering import Lingering
from deploy.serving.middleware import Guard, json_response
from deploy.serving.models import Models, Served
from deploy.serving.numbers import LARGE_BYTES, Body, is_large
from deploy.serving.protocol import build_response, parse_request
from deploy.serving.regions import NO_REGIONS, Regions
from deploy.serving.request import priority_of, timeout_of
from deploy.serving.rest_memory import memory_routes
from deploy.serving.stages import Stages, Trace
from deploy.version import __version__

_HEADER_LENGTH = "inference-header-content-length"
_MOST_TOP = 1000
_MOST_DOCUMENT = 1 << 20  # it is read in the event loop


def make_app(
    models: Models,
    *,
    access: Access,
    limits: Limits,
    log_requests: bool = False,
    replica: str | None = None,
    crowded: Callable[[], bool] = lambda: False,
    regions: Regions = NO_REGIONS,
    trace: Trace | None = None,
) -> ASGIApp:
    """The ASGI application over `models`.

    replica: the name of this server, if it is one of several behind one address: its metrics have the name as a label, and it refuses
    to load and unload models.
    crowded: whether the server has too many connections; requests are then refused with 503. regions: of shared memory.
    trace: called with the stages of each request.
    """
    door = _Door(models, limits, replica, regions, trace)
    model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    routes = [
        Route("/v2", door.server, methods=["GET"]),
        Route("/v2/health/live", door.live, methods=["GET"]),
        Route("/v2/health/ready", door.ready, methods=["GET"]),
        Route("/v2/models/stats", door.all_statistics, methods=["GET"]),
        Route("/metrics", door.metrics, methods=["GET"]),
        Route("/v2/repository/index", door.index, methods=["POST"]),
        Route("/v2/repository/models/{model}/load", door.load, methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", door.unload, methods=["POST"]),
    ]
    routes += memory_routes(regions, door.document)
    for base in (model, version):
        routes += [
            Route(f"{base}/classify", door.classify, methods=["POST"]),
            Route(f"{base}/segment", door.segment, methods=["POST"]),
            Route(f"{base}/detect", door.detect, methods=["POST"]),
            Route(base, door.metadata, methods=["GET"]),
            Route(f"{base}/ready", door.model_ready, methods=["GET"]),
            Route(f"{base}/config", door.config, methods=["GET"]),
            Route(f"{base}/stats", door.statistics, methods=["GET"]),
        ]
    router = Router(routes, redirect_slashes=False)
    return Lingering(Guard(router, door.infer, access, log_requests=log_requests, crowded=crowded))


class _Door:
    def __init__(self, models: Models, limits: Limits, replica: str | None, regions: Regions, trace: Trace | None) -> None:
        self._models = models
        self._limits = limits
        self._replica = replica
        self._regions = regions
        self._trace = trace

    # The server, the models and their state.

    async def server(self, request: Request) -> Response:
        return json_response({"name": "deploy", "version": __version__, "extensions": answers.extensions(self._regions)})

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        return json_response({"ready": self._models.ready}, 200 if self._models.ready else 503)

    async def metrics(self, request: Request) -> Response:
        text = metrics.render(self._models.meters, self._replica).encode()
        encoding, content = await compress(text, request.headers.get("accept-encoding", ""))
        return Response(content, media_type=metrics.CONTENT_TYPE, headers=encoding)

    async def all_statistics(self, request: Request) -> Response:
        loaded = [self._models.get(name, version) for name in self._models.names for version in self._models.versions(name)]
        return json_response({"model_stats": [answers.statistics(served) for served in loaded]})

    async def metadata(self, request: Request) -> Response:
        served = self._served(request)
        return json_response(answers.metadata(served, self._models.versions(served.source.name)))

    async def model_ready(self, request: Request) -> Response:
        try:
            served = self._served(request)
        except UnavailableError as error:
            return json_response({"error": str(error), "ready": False}, 503)
        return json_response({"name": served.source.name, "ready": True})

    async def config(self, request: Request) -> Response:
        return json_response(answers.config(self._served(request)))

    async def statistics(self, request: Request) -> Response:
        return json_response({"model_stats": [answers.statistics(self._served(request))]})

    # Admin.

    async def index(self, request: Request) -> Response:
        only_ready = (await self.document(request)).get("ready", False)
        return json_response([entry for entry in self._models.index() if not only_ready or entry["state"] == "READY"])

    async def load(self, request: Request) -> Response:
        self._check_alone()
        _refuse_upload(await self.document(request))
        await asyncio.to_thread(self._models.load, request.path_params["model"])
        return json_response({})

    async def unload(self, request: Request) -> Response:
        self._check_alone()
        await self.document(request)
        await asyncio.to_thread(self._models.unload, request.path_params["model"])
        return json_response({})

    def _check_alone(self) -> None:
        if self._replica is not None:
            raise answers.refuse_one_of_several()

    # Inference.

    async def infer(self, model: str, version: str | None, headers: Mapping[str, str], receive: Receive) -> Response:
        stages = Stages()
        error: BaseException | None = None
        try:
            return await self._infer(model, version, headers, receive, stages)
        except BaseException as caught:
            error = caught
            raise
        finally:
            if self._trace is not None:
                self._trace(headers, stages, error)

    async def _infer(
        self, model: str, version: str | None, headers: Mapping[str, str], receive: Receive, stages: Stages
    ) -> Response:
        stages.model, stages.version = model, version or ""
        served = self._models.get(model, version or "")
        length = headers.get(_HEADER_LENGTH)
        if length is not None and not (length.isascii() and length.isdecimal() and len(length) < 20):
            raise InputError(f"Inference-Header-Content-Length must be a number, not {length!r}")
        body = await self._read(headers, receive, self._limits.request_bytes)
        head = len(body) if length is None else int(length)
        parse = partial(parse_request, body, None if length is None else head, served.inputs, served.outputs, self._regions)
        asked = await asyncio.to_thread(parse) if head > LARGE_BYTES else parse()
        del body, parse
        stages.decoded, stages.request_id = time.perf_counter(), asked.id
        used, results = await self._models.infer(
            served,
            asked.feed,
            pinned=version is not None,
            priority=asked.priority,
            timeout_s=asked.timeout_s,
            observe=stages.set_ran,
        )
        stages.version = used.source.version
        build = partial(
            build_response,
            used.source.name,
            used.source.version,
            asked,
            results,
            regions=self._regions,
            classes=used.artifact.manifest.classes,
        )
        content, header_length = await asyncio.to_thread(build) if is_large(results) else build()
        encoding, content = await compress(content, headers.get("accept-encoding", ""))
        if header_length is None:
            return Response(content, media_type="application/json", headers=encoding)
        length_header = {"Inference-Header-Content-Length": str(header_length)}
        return Response(content, media_type="application/octet-stream", headers={**length_header, **encoding})

    async def classify(self, request: Request) -> Response:
        """Classify the image in the body: the `?top=` likeliest classes, and their probabilities."""
        top = _number(request.query_params.get("top", "5"), "top", _MOST_TOP)
        ran = await self._run_image(request, "classify")
        (classes,) = likeliest(ran.results[class_scores(ran.artifact).name][:1], ran.artifact.manifest.classes, top)
        return ran.answer({"classes": [{"class": name, "probability": share} for name, share in classes]})

    async def segment(self, request: Request) -> Response:
        """The mask of the image in the body, a PNG of class indices in its size: in JSON, or alone where `Accept` is image/png."""
        ran = await self._run_image(request, "segment")
        mask, content = await asyncio.to_thread(ran.mask)
        if request.headers.get("accept", "").partition(";")[0].strip() == "image/png":
            return Response(content, media_type="image/png")
        classes = [{"class": name, "share": share} for name, share in shares(ran.artifact, mask)]
        size = {"height": mask.shape[0], "width": mask.shape[1]}
        return ran.answer({**size, "classes": classes, "mask": base64.b64encode(content).decode()})

    async def detect(self, request: Request) -> Response:
        """The boxes in the image of the body with a score of `?min_score=` or more, as corners in its pixels."""
        least = _share(request.query_params.get("min_score", "0.3"), "min_score")
        ran = await self._run_image(request, "detect")
        return ran.answer({"boxes": boxes_json(await asyncio.to_thread(ran.boxes, least))})

    async def _run_image(self, request: Request, task: Task) -> Ran:
        """Run the image in the body through a model that is for `task`."""
        served = self._served(request)
        check_task(served, task)
        priority = priority_of(_number(request.query_params.get("priority", "0"), "priority", 2**32 - 1, least=0))
        timeout_s = timeout_of(_number(request.query_params.get("timeout", "0"), "timeout", 2**62, least=0))
        data = bytes(await self._body(request))
        feed = await asyncio.to_thread(image_feed, data, image_input(served.artifact), self._limits.image_pixels)
        used, results = await self._models.infer(
            served, feed, pinned="version" in request.path_params, priority=priority, timeout_s=timeout_s
        )
        return Ran(used, results, data)

    def _served(self, request: Request) -> Served:
        return self._models.get(request.path_params["model"], request.path_params.get("version", ""))

    async def document(self, request: Request) -> dict[str, Any]:
        """The JSON object in the body of a request that has no tensors. Raises InputError."""
        most = min(_MOST_DOCUMENT, self._limits.request_bytes)
        return _document(bytes(await self._read(request.headers, request.receive, most)))

    async def _body(self, request: Request) -> Body:
        return await self._read(request.headers, request.receive, self._limits.request_bytes)

    async def _read(self, headers: Mapping[str, str], receive: Receive, most: int) -> Body:
        reading = read_body(receive, headers.get("content-length"), headers.get("content-encoding", ""), most)
        try:
            return await in_time(reading, self._limits.body_s)
        except TimeoutError:
            raise RefusedError(408, f"the body did not come within {self._limits.body_s:g} s") from None


def _document(body: bytes) -> dict[str, Any]:
    if not body.strip():
        return {}
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the request is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError("the request must be a JSON object")
    return value


def _refuse_upload(document: Mapping[str, Any]) -> None:
    """Raise RefusedError if a client sends a configuration or a file: models come from the server's disk only."""
    if document.get("parameters"):
        raise RefusedError(403, "a model is loaded from the path that the server was started with; nothing is uploaded")


def _number(text: str, name: str, most: int, *, least: int = 1) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise InputError(f"{name} must be a number from {least} to {most}, not {text!r}")
    return int(text)


def _share(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"{name} must be a number from 0 to 1, not {text!r}")
    return value
