"""The options of a server: where it listens, who may call, how it stops, and how it is spread over a Ray cluster."""

from dataclasses import dataclass, field
from pathlib import Path

from deploy.errors import UsageError
from deploy.options import option
from deploy.serving.address import check_tls
from deploy.serving.guard import Access, Limits, is_loopback

LOCAL = "local"
"""The address that stands for Ray on this machine alone, which is started with the server and ends with it."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where and how to serve.

    http_port, grpc_port: None opens no REST or gRPC door.
    stop_delay_s: after SIGTERM the server goes on taking requests for so long while it reports that it is not ready, so that
        load balancers can turn away.
    keep_alive_s: a connection without a request is closed after so long. connections: the most that each door has open at a time; over REST,
        one more takes the place of that which has been idle for longest; connections_per_address: the same for those from one address, or
        one /64 network of IPv6. shared_memory: whether clients may register system shared memory.
    """

    host: str = option("127.0.0.1", "Address to listen on.", metavar="H")
    http_port: int | None = option(8000, "Port of the REST door; 0 takes a free one.", metavar="P")
    grpc_port: int | None = option(8001, "Port of the gRPC door; 0 takes a free one.", metavar="P")
    tls_cert: Path | None = option(None, "Certificate chain in PEM; with --tls-key.", metavar="FILE")
    tls_key: Path | None = option(None, "Private key in PEM.", metavar="FILE")
    insecure: bool = option(False, "Allow a --host that other machines can reach without a token and TLS.")
    stop_delay_s: float = option(1.0, "On SIGTERM: time to report not ready before closing.", flag="--stop-delay", metavar="S")
    drain_s: float = option(30.0, "Then the time to finish running requests.", flag="--drain-timeout", metavar="S")
    keep_alive_s: float = option(75.0, "Close a connection that is idle for so long.", flag="--keep-alive", metavar="S")
    connections: int = option(
        4096, "The most connections of each door; over REST, one more closes the longest idle.", metavar="N"
    )
    connections_per_address: int | None = option(
        None, "The same over REST for those from one address; not behind a proxy.", metavar="N", default="no bound"
    )
    shared_memory: bool = option(False, "Take tensors from and into system shared memory that clients register.")
    otel: bool = option(False, "Send traces by OpenTelemetry; its own OTEL_ variables say where.")
    log_requests: bool = option(False, "Log every request, not only errors.")
    token: str | None = None
    admin_token: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for port in (self.http_port, self.grpc_port):
            if port is not None and not 0 <= port < 65536:
                raise UsageError(f"a port must be between 0 and 65535, not {port}")
        if self.http_port is None and self.grpc_port is None:
            raise UsageError("both doors are shut: give `http_port` or `grpc_port` (leave out `no_http` or `no_grpc`)")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("`tls_cert` and `tls_key` go together")
        if self.tls_cert is not None and self.tls_key is not None:
            check_tls(self.tls_cert, self.tls_key)
        if not is_loopback(self.host) and self.token is None and self.tls_cert is None and not self.insecure:
            raise UsageError(
                f"`host` {self.host} opens the server to other machines: give it a token (`token_file`) or TLS (`tls_cert`,"
                " `tls_key`), or say `insecure`"
            )
        for name in ("stop_delay_s", "drain_s"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must be 0 or more, not {getattr(self, name):g}")
        if not self.keep_alive_s > 0:
            raise UsageError(f"`keep_alive_s` must be more than 0, not {self.keep_alive_s:g}")
        for name in ("connections", "connections_per_address"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"`{name}` must be 1 or more, not {value}")

    @property
    def access(self) -> Access:
        return Access(loopback=is_loopback(self.host), token=self.token, admin_token=self.admin_token)


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How many replicas there are on a Ray cluster, and where.

    address: the address of the cluster, as `ray.init` takes it; "local" starts Ray on this machine; None takes the cluster of this
        machine, or "local" if there is none.
    """

    address: str | None = None
    replicas: int = option(1, "With --ray: the least number of replicas.", metavar="N")
    max_replicas: int | None = option(None, "With --ray: the most replicas; Ray scales.", metavar="N", default="as --replicas")
    replicas_per_node: int | None = option(None, "With --ray: the most replicas on one node.", metavar="N")
    target_requests: float = option(16.0, "With --max-replicas: running requests of a replica that Ray scales to.", metavar="N")
    replica_cpus: float = option(1.0, "With --ray: CPUs of a replica, and its threads unless --threads.", metavar="N")
    replica_gpus: float = option(0.0, "With --ray: GPUs of a replica.", metavar="N")
    detach: bool = option(False, "With --ray ADDRESS: leave once it is deployed; it goes on.")

    def __post_init__(self) -> None:
        if self.replicas < 1 or (self.replicas_per_node is not None and self.replicas_per_node < 1):
            raise UsageError("`replicas` and `replicas_per_node` must be 1 or more")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise UsageError(f"`max_replicas` {self.max_replicas} must not be less than `replicas` {self.replicas}")
        if not self.target_requests > 0 or not self.replica_cpus >= 0 or not self.replica_gpus >= 0:
            raise UsageError("`target_requests` must be more than 0, `replica_cpus` and `replica_gpus` 0 or more")
        if self.detach and self.address in (None, LOCAL):
            raise UsageError("`detach` needs the address of a cluster: Ray that is started here ends with this process")
        if self.address is not None and Path(self.address).exists():
            raise UsageError(
                f"{self.address} is a path, not the address of a cluster: on the command line, put --ray behind the artifacts,"
                f" or write --ray={LOCAL}"
            )
