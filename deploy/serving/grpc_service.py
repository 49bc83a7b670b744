"""The methods of the gRPC door: Open Inference Protocol v2, Triton's extensions, and gRPC's health checks."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from google.protobuf import json_format

from deploy.errors import ModelNotFoundError, RefusedError, UnavailableError
from deploy.serving import answers
from deploy.serving.grpc_large import Received
from deploy.serving.grpc_messages import message
from deploy.serving.grpc_tensors import fill_response, parse_request
from deploy.serving.models import Models
from deploy.serving.numbers import is_large
from deploy.serving.regions import NO_REGIONS, Regions, refuse_cuda
from deploy.serving.stages import Stages, Trace
from deploy.version import __version__

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"

ADMIN = frozenset(("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"))
"""Methods that need the token of admin calls."""

OPEN = frozenset(("ServerLive", "ServerReady", "Check", "Watch"))
"""Methods that need none."""

_WATCH_S = 0.2


class Service:
    """The methods of both services but those of inference, under the names that they have in the protocol; and inference.

    closing: set when streams must come to an end. is_alone: not one of several replicas, which neither loads nor unloads models.
    """

    def __init__(
        self, models: Models, regions: Regions = NO_REGIONS, trace: Trace | None = None, *, is_alone: bool = True
    ) -> None:
        self._models = models
        self._is_alone = is_alone
        self._regions = regions
        self._trace = trace
        self.closing = asyncio.Event()

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
        return message("inference.ServerMetadataResponse")(
            name="deploy", version=__version__, extensions=answers.extensions(self._regions)
        )

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
        while not self.closing.is_set():
            status = self._status(request.service)
            if status != last:
                yield message("grpc.health.v1.HealthCheckResponse")(status=status)
                last = status
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.closing.wait(), _WATCH_S)
        raise UnavailableError("the server is stopping")

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

    def _check_alone(self) -> None:
        if not self._is_alone:
            raise answers.refuse_one_of_several()

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        self._check_alone()
        if request.parameters:
            raise RefusedError(403, "a model is loaded from the path that the server was started with; nothing is uploaded")
        await asyncio.to_thread(self._models.load, request.model_name)
        return message("inference.RepositoryModelLoadResponse")()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        self._check_alone()
        await asyncio.to_thread(self._models.unload, request.model_name)
        return message("inference.RepositoryModelUnloadResponse")()

    # Shared memory.

    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        regions = {region.name: region.to_json() for region in self._regions.status(request.name)}
        return json_format.ParseDict({"regions": regions}, message("inference.SystemSharedMemoryStatusResponse")())

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        self._regions.register(request.name, request.key, request.offset, request.byte_size)
        return message("inference.SystemSharedMemoryRegisterResponse")()

    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        self._regions.unregister(request.name)
        return message("inference.SystemSharedMemoryUnregisterResponse")()

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        return message("inference.CudaSharedMemoryStatusResponse")()

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        raise refuse_cuda()

    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        return message("inference.CudaSharedMemoryUnregisterResponse")()

    # Inference.

    async def infer(self, received: Received, context: Any, answer: Any, *, is_stream: bool = False) -> bool:
        """Fill `answer`, an empty `ModelInferResponse`; whether it is large.

        is_stream: the request is one of many of its call, whose deadline is not its own.
        """
        stages = Stages()
        stages.began = received.began
        error: BaseException | None = None
        try:
            return await self._infer(received, None if is_stream else context.time_remaining(), answer, stages)
        except BaseException as caught:
            error = caught
            raise
        finally:
            if self._trace is not None:
                self._trace(metadata(context), stages, error)

    async def _infer(self, received: Received, left_s: float | None, answer: Any, stages: Stages) -> bool:
        request = received.message
        stages.model, stages.version, stages.request_id = request.model_name, request.model_version, request.id
        served = self._models.get(request.model_name, request.model_version)
        parse = partial(parse_request, received, served, self._regions)
        asked = await asyncio.to_thread(parse) if received.contents else parse()
        del received, parse
        stages.decoded = time.perf_counter()
        timeout_s = asked.timeout_s
        if left_s is not None:  # nobody waits for a later answer
            timeout_s = left_s if timeout_s is None else min(left_s, timeout_s)
        used, results = await self._models.infer(
            served,
            asked.feed,
            pinned=bool(request.model_version),
            priority=asked.priority,
            timeout_s=timeout_s,
            observe=stages.set_ran,
        )
        stages.version = used.source.version
        large = is_large(results)
        fill = partial(fill_response, answer, used, asked, results, self._regions)
        await asyncio.to_thread(fill) if large else fill()
        return large


def metadata(context: Any) -> dict[str, str]:
    """The metadata of a call that are text; gRPC has their names in lower case."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
