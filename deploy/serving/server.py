"""A server as a whole: its doors, the order in which it comes up, and how it goes down without losing a request."""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.errors import BackendError, UsageError
from deploy.serving.guard import Access, Limits, is_loopback
from deploy.serving.models import ModelOptions, Models, ModelSource

try:
    import uvicorn

    from deploy.serving.rest_app import JsonLines, make_app
except ImportError as error:
    raise BackendError(
        f"deploy serve needs packages that are missing ({error}); install them with: pip install 'deploy[serving]'"
    ) from error

logger = logging.getLogger("deploy.serving")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where and how to serve. A port of 0 takes a free one; None leaves the door shut.

    insecure: a host that other machines reach is allowed without a token and without TLS. stop_delay_s: on SIGTERM, how long the
    server says that it is not ready and still takes requests, so that balancers can turn away. drain_s: how long it then
    waits for requests under way. connections: at most at a time over REST.
    """

    host: str = "127.0.0.1"
    http_port: int | None = 8000
    grpc_port: int | None = 8001
    token: str | None = None
    admin_token: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    limits: Limits = field(default_factory=Limits)
    connections: int = 1024
    stop_delay_s: float = 1.0
    drain_s: float = 30.0
    log_requests: bool = False

    def __post_init__(self) -> None:
        for port in (self.http_port, self.grpc_port):
            if port is not None and not 0 <= port < 65536:
                raise UsageError(f"a port must be between 0 and 65535, not {port}")
        if self.http_port is None and self.grpc_port is None:
            raise UsageError("both doors are shut: leave one of --no-http and --no-grpc out")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("--tls-cert and --tls-key go together")
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not file.is_file():
                raise UsageError(f"no file {file}")
        if not is_loopback(self.host) and self.token is None and self.tls_cert is None and not self.insecure:
            raise UsageError(
                f"--host {self.host} opens the server to other machines: give it a token (--token-file FILE) or TLS (--tls-cert,"
                " --tls-key), or say --insecure"
            )
        if self.stop_delay_s < 0 or self.drain_s < 0 or self.connections < 1:
            raise UsageError("--stop-delay and --drain-timeout must be 0 or more, and connections 1 or more")

    @property
    def access(self) -> Access:
        return Access(loopback=is_loopback(self.host), token=self.token, admin_token=self.admin_token)


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


class _Http(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(models: Models, options: ServerOptions) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    doors: list[Any] = []
    try:
        if options.http_port is not None:
            doors.append(await _HttpDoor.open(models, options))
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


class _HttpDoor:
    name = "http"

    def __init__(self, server: _Http, task: "asyncio.Task[None]", address: str) -> None:
        self._server = server
        self._task = task
        self.address = address

    @classmethod
    async def open(cls, models: Models, options: ServerOptions) -> "_HttpDoor":
        app = make_app(models, access=options.access, limits=options.limits, log_requests=options.log_requests)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            limit_concurrency=options.connections,
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
        """Take no more connections, and wait for the requests under way."""
        self._server.should_exit = True
        await self._task


def _listen(host: str, port: int) -> socket.socket:
    """Raises OSError naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), f"{host}:{port}") from error


def log_as_json(*more: str) -> None:
    """Have what the server logs, and the loggers of `more`, go to standard error as lines of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("deploy", "uvicorn", *more):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).propagate = False
    logging.getLogger("deploy").setLevel(logging.INFO)
    for name in ("uvicorn", *more):
        logging.getLogger(name).setLevel(logging.WARNING)
