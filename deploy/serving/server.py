"""The server: starts the doors in order, and stops them without losing a request."""

import asyncio
import gc
import logging
import os
import signal
import threading
from typing import Any

from deploy.serving.log import log_as_json
from deploy.serving.models import ModelOptions, Models
from deploy.serving.options import ServerOptions
from deploy.serving.regions import Regions
from deploy.serving.source import ModelSource
from deploy.serving.stages import Trace

_LATE_S = 5.0
"""Beyond the grace: time for what the doors cut off to unwind."""

logger = logging.getLogger("deploy.serving")


def serve(sources: list[ModelSource], models: ModelOptions, options: ServerOptions) -> int:
    """Load the models, open the doors and serve until SIGTERM or SIGINT; the exit status. The log goes to standard error as JSON.

    Raises what loading raises, OSError if a port is taken, and ImportError for a library of the extra `serving` that is missing.
    """
    log_as_json()
    kinds = _kinds_of_doors(options)  # a missing library is reported before the models are loaded
    trace = tracing(options)
    served = Models(sources, models)
    try:
        served.load_all()
        gc.collect()
        gc.freeze()  # the objects of now stay: the collector need not go through them while requests wait
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(served, options, kinds, trace))
    finally:
        served.close()
        if trace is not None:
            trace.close()
    return 0


def tracing(options: ServerOptions) -> Any:
    """What traces requests, None where that was not asked for. Raises ImportError for a library of the extra `otel` that is missing."""
    if not options.otel:
        return None
    from deploy.serving.tracing import Tracing

    return Tracing()


def _kinds_of_doors(options: ServerOptions) -> list[Any]:
    """The classes of the doors to open. The libraries of a door that stays shut are not needed."""
    kinds: list[Any] = []
    if options.http_port is not None:
        from deploy.serving.rest_door import HttpDoor

        kinds.append(HttpDoor)
    if options.grpc_port is not None:
        from deploy.serving.grpc_door import GrpcDoor

        kinds.append(GrpcDoor)
    return kinds


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _serve(models: Models, options: ServerOptions, kinds: list[Any], trace: Trace | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, stop, number)
    regions = Regions(on=options.shared_memory, most_bytes=options.limits.request_bytes)
    doors: list[Any] = []
    try:
        for kind in kinds:
            doors.append(await kind.open(models, options, regions, trace))
        for door in doors:
            logger.info("serving", extra={"door": door.name, "address": door.address, "models": list(models.names)})
        await stop.wait()
        models.ready = False
        logger.info("stopping", extra={"delay_s": options.stop_delay_s})
        await asyncio.sleep(options.stop_delay_s)
    finally:
        models.ready = False
        # A model that computes for longer than the grace cannot be interrupted.
        late = threading.Timer(options.drain_s + _LATE_S, _end, [1, f"not stopped within --drain-timeout {options.drain_s:g} s"])
        late.daemon = True
        late.start()
        await asyncio.gather(*(door.close() for door in doors))
        regions.close()
    logger.info("stopped")


def _stop(stop: asyncio.Event, number: int) -> None:
    """The first signal begins the stop, the second ends the process."""
    if stop.is_set():
        _end(128 + number, "ended at once by a second signal")
    stop.set()


def _end(status: int, why: str) -> None:
    logger.error("ended", extra={"error": why})
    os._exit(status)
