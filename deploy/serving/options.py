"""Where and how to serve."""

from dataclasses import dataclass, field
from pathlib import Path

from deploy.errors import UsageError
from deploy.serving.guard import Access, Limits, is_loopback


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
