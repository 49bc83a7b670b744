"""The REST door: uvicorn, running the application of `rest_app`."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from deploy.errors import BackendError
from deploy.serving.models import Models
from deploy.serving.options import ServerOptions
from deploy.serving.rest_app import make_app


class _Http(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpDoor:
    """A running server for REST."""

    name = "http"

    def __init__(self, server: _Http, task: "asyncio.Task[None]", address: str) -> None:
        self._server = server
        self._task = task
        self.address = address

    @classmethod
    async def open(cls, models: Models, options: ServerOptions) -> "HttpDoor":
        """Start the server. Raises OSError if the port is taken."""

        def crowded() -> bool:
            # Counts as uvicorn's `limit_concurrency` does. Its answer is not used: it is not JSON, and it does not linger.
            state = server.server_state
            return max(len(state.connections), len(state.tasks)) >= options.connections

        app = make_app(models, access=options.access, limits=options.limits, log_requests=options.log_requests, crowded=crowded)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=round(options.drain_s) or 1,
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
        )
        server = _Http(config)
        sock = _listen(options.host, options.http_port or 0)
        task = asyncio.create_task(server.serve([sock]))
        while not server.started:
            if task.done():
                task.result()
                raise BackendError("the REST door did not open")
            await asyncio.sleep(0.005)
        host, port = sock.getsockname()[:2]
        scheme = "https" if options.tls_cert else "http"
        return cls(server, task, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")

    async def close(self) -> None:
        """Accept no more connections, and wait for the requests that have been accepted."""
        self._server.should_exit = True
        await self._task


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError with the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), f"{host}:{port}") from error
