"""The REST door: uvicorn, running the application of `rest_app`."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn

from deploy.errors import BackendError
from deploy.serving.address import listen, most_connections
from deploy.serving.connection import Connection, Room
from deploy.serving.models import Models
from deploy.serving.options import ServerOptions
from deploy.serving.regions import NO_REGIONS, Regions
from deploy.serving.rest_app import make_app
from deploy.serving.stages import Trace


class _Http(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpDoor:
    """A running server for REST."""

    name = "http"

    def __init__(
        self, server: _Http, task: "asyncio.Task[None]", looking: "asyncio.Task[None]", room: Room, address: str
    ) -> None:
        self._server = server
        self._task = task
        self._looking = looking
        self.room = room
        self.address = address

    @classmethod
    async def open(
        cls, models: Models, options: ServerOptions, regions: Regions = NO_REGIONS, trace: Trace | None = None
    ) -> "HttpDoor":
        """Start the server. Raises OSError if the port is taken, and UsageError for a host that is not known."""
        room = Room(most_connections(options.connections), options.connections_per_address)

        def crowded() -> bool:
            return len(server.server_state.connections) > room.most

        app = make_app(
            models,
            access=options.access,
            limits=options.limits,
            log_requests=options.log_requests,
            crowded=crowded,
            regions=regions,
            trace=trace,
        )
        config = uvicorn.Config(
            app,
            http=partial(Connection, room=room),  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=options.keep_alive_s,  # type: ignore[arg-type]
            timeout_graceful_shutdown=round(options.drain_s) or 1,
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
        )
        server = _Http(config)
        sock = listen(options.host, options.http_port or 0)
        task = asyncio.create_task(server.serve([sock]))
        looking = asyncio.create_task(_look(server, options.limits.body_s))
        while not server.started:
            if task.done():
                task.result()
                raise BackendError("the REST door did not open")
            await asyncio.sleep(0.005)
        host, port = sock.getsockname()[:2]
        scheme = "https" if options.tls_cert else "http"
        return cls(server, task, looking, room, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")

    async def close(self) -> None:
        """Accept no more connections, and wait for the requests that have been accepted."""
        self._server.should_exit = True
        await self._task
        self._looking.cancel()


async def _look(server: _Http, seconds: float) -> None:
    """Look through the connections for those that are too slow, for ever."""
    while True:
        await asyncio.sleep(min(1.0, seconds / 4))
        now = time.monotonic()
        for connection in list(server.server_state.connections):
            connection.look(now, seconds)  # type: ignore[union-attr]
