"""A server as a whole: its doors, the order in which it comes up, and how it goes down without losing a request."""

import asyncio
import gc
import logging
import signal
from typing import Any

from deploy.serving.models import ModelOptions, Models
from deploy.serving.options import ServerOptions
from deploy.serving.rest_door import HttpDoor
from deploy.serving.source import ModelSource

logger = logging.getLogger("deploy.serving")


def serve(sources: list[ModelSource], models: ModelOptions, options: ServerOptions) -> int:
    """Load the models, open the doors and serve until SIGTERM or SIGINT; the exit status.

    Raises what loading raises, and OSError where a port is taken.
    """
    served = Models(sources, models)
    try:
        served.load_all()
        gc.collect()
        gc.freeze()  # what is there now stays: not to be gone through again and again while requests wait
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(served, options))
    finally:
        served.close()
    return 0


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _serve(models: Models, options: ServerOptions) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    doors: list[Any] = []
    try:
        if options.http_port is not None:
            doors.append(await HttpDoor.open(models, options))
        if options.grpc_port is not None:
            from deploy.serving.grpc_door import GrpcDoor

            doors.append(await GrpcDoor.open(models, options))
        for door in doors:
            logger.info("serving", extra={"door": door.name, "address": door.address, "models": list(models.names)})
        await stop.wait()
        models.ready = False
        logger.info("stopping", extra={"delay_s": options.stop_delay_s})
        await asyncio.sleep(options.stop_delay_s)
    finally:
        models.ready = False
        await asyncio.gather(*(door.close() for door in doors))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    logger.info("stopped")
