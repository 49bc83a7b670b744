"""The gRPC door: grpc's server, running the calls of `grpc_frame`."""

from typing import Any

import grpc

from deploy.serving.address import check_address, most_connections
from deploy.serving.grpc_frame import Frame, handlers
from deploy.serving.grpc_service import HEALTH, SERVICE, Service
from deploy.serving.models import Models
from deploy.serving.options import ServerOptions
from deploy.serving.regions import NO_REGIONS, Regions
from deploy.serving.stages import Trace

_HANDSHAKE_S = 20


class GrpcDoor:
    """A running server for gRPC."""

    name = "grpc"

    def __init__(self, server: Any, service: Service, address: str, drain_s: float) -> None:
        self._server = server
        self._service = service
        self.address = address
        self._drain_s = drain_s

    @classmethod
    async def open(
        cls, models: Models, options: ServerOptions, regions: Regions = NO_REGIONS, trace: Trace | None = None
    ) -> "GrpcDoor":
        """Start the server. Raises OSError if the port is taken."""
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", options.limits.request_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.max_connection_idle_ms", round(options.keep_alive_s * 1e3)),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_S * 1000),
                ("grpc.max_allowed_incoming_connections", most_connections(options.connections)),
            ]
        )
        service = Service(models, regions, trace)
        frame = Frame(service, options.access, options.limits, log_requests=options.log_requests)
        server.add_generic_rpc_handlers(tuple(handlers(name, frame.calls(name)) for name in (SERVICE, HEALTH)))
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{host}:{options.grpc_port}"
        check_address(options.host, options.grpc_port or 0)
        try:
            if options.tls_cert is not None and options.tls_key is not None:
                pair = (options.tls_key.read_bytes(), options.tls_cert.read_bytes())
                port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                port = server.add_insecure_port(address)
        except RuntimeError as error:  # taken since it was checked
            raise OSError(98, "Address already in use", address) from error
        await server.start()
        return cls(server, service, f"{host}:{port}", options.drain_s)

    async def close(self) -> None:
        """Accept no more requests, end the streams, and wait for the requests that have been accepted."""
        self._service.closing.set()
        await self._server.stop(self._drain_s)
