"""`deploy serve`."""

import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from deploy.cli.common import backend_option, debug_option, device_option, threads_option
from deploy.cli.options import PATH
from deploy.errors import UsageError

_TOKEN = "DEPLOY_TOKEN"  # noqa: S105  (the name of a variable)
_ADMIN_TOKEN = "DEPLOY_ADMIN_TOKEN"  # noqa: S105


@click.command("serve")
@click.argument("models", nargs=-1, metavar="ARTIFACT|NAME=PATH[@VERSION]...")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="H", help="Address to listen on.")
@click.option(
    "--http-port", type=int, default=8000, show_default=True, metavar="P", help="Port of the REST door; 0 takes a free one."
)
@click.option(
    "--grpc-port", type=int, default=8001, show_default=True, metavar="P", help="Port of the gRPC door; 0 takes a free one."
)
@click.option("--no-http", is_flag=True, help="No REST door.")
@click.option("--no-grpc", is_flag=True, help="No gRPC door.")
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows of a batch at most.  [default: what the profile takes, or 32]",
)
@click.option(
    "--delay-ms", type=float, default=0.0, show_default=True, metavar="MS", help="How long a batch waits for more rows."
)
@click.option(
    "--queue",
    "queue_rows",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="Rows that may wait for each model; beyond: 503.",
)
@click.option(
    "--instances",
    type=click.IntRange(min=1),
    metavar="N",
    help="Batches in a model at a time.  [default: what its backend has use for]",
)
@click.option("--token-file", type=PATH, metavar="FILE", help=f"Token that requests must bear.  [default: ${_TOKEN}, else none]")
@click.option(
    "--admin-token-file", type=PATH, metavar="FILE", help=f"Token of load, unload and index.  [default: ${_ADMIN_TOKEN}]"
)
@click.option("--tls-cert", type=PATH, metavar="FILE", help="Certificate chain in PEM; with --tls-key.")
@click.option("--tls-key", type=PATH, metavar="FILE", help="Private key in PEM.")
@click.option("--insecure", is_flag=True, help="Allow a --host that other machines reach without a token and TLS.")
@click.option(
    "--max-request-mb", type=click.IntRange(min=1), default=64, show_default=True, metavar="MB", help="Size of a request at most."
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=50_000_000,
    show_default=True,
    metavar="N",
    help="Pixels of an image at most.",
)
@click.option(
    "--body-timeout", "body_s", type=float, default=30.0, show_default=True, metavar="S", help="Time for a request to come whole."
)
@click.option(
    "--stop-delay",
    "stop_delay_s",
    type=float,
    default=1.0,
    show_default=True,
    metavar="S",
    help="On SIGTERM: time to be not ready before closing.",
)
@click.option(
    "--drain-timeout", "drain_s", type=float, default=30.0, show_default=True, metavar="S", help="Time for requests under way."
)
@click.option("--log-requests", is_flag=True, help="Log every request, not only errors.")
@click.option(
    "--ray",
    "address",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Serve over REST on the Ray cluster at ADDRESS; `local` starts Ray here.  [without ADDRESS: this machine's cluster, or local]",
)
@click.option("--replicas", type=int, metavar="N", help="With --ray: replicas at least.  [default: 1]")
@click.option("--max-replicas", type=int, metavar="N", help="With --ray: replicas at most; Ray scales.  [default: as --replicas]")
@click.option("--replicas-per-node", type=int, metavar="N", help="With --ray: replicas on one node at most.")
@click.option(
    "--target-requests",
    type=float,
    metavar="N",
    help="With --max-replicas: requests under way for each replica that Ray scales to.  [default: 16]",
)
@click.option(
    "--replica-cpus",
    type=float,
    metavar="N",
    help="With --ray: CPUs of a replica, and its threads unless --threads.  [default: 1]",
)
@click.option("--replica-gpus", type=float, metavar="N", help="With --ray: GPUs of a replica.  [default: 0]")
@click.option("--detach", is_flag=True, help="With --ray ADDRESS: leave once it is deployed; it goes on.")
@backend_option
@device_option
@threads_option
@debug_option
def command(
    models: tuple[str, ...],
    host: str,
    http_port: int,
    grpc_port: int,
    no_http: bool,
    no_grpc: bool,
    max_batch: int | None,
    delay_ms: float,
    queue_rows: int,
    instances: int | None,
    token_file: Path | None,
    admin_token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    insecure: bool,
    max_request_mb: int,
    max_pixels: int,
    body_s: float,
    stop_delay_s: float,
    drain_s: float,
    log_requests: bool,
    address: str | None,
    replicas: int | None,
    max_replicas: int | None,
    replicas_per_node: int | None,
    target_requests: float | None,
    replica_cpus: float | None,
    replica_gpus: float | None,
    detach: bool,
    backend: str,
    device: str,
    threads: int | None,
) -> int:
    """Serve artifacts over the Open Inference Protocol v2, REST and gRPC, with dynamic batching.

    A model is called like its artifact unless NAME= says otherwise. Logs go to standard error, a line of JSON each.
    """
    from deploy.runtime.batching.batcher import BatcherOptions
    from deploy.serving.guard import Limits, read_token
    from deploy.serving.models import ModelOptions
    from deploy.serving.options import RayOptions, ServerOptions
    from deploy.serving.source import ModelSource

    batching = BatcherOptions(max_rows=max_batch, delay_ms=delay_ms, queue_rows=queue_rows, instances=instances)
    options = ServerOptions(
        host=host,
        http_port=None if no_http else http_port,
        grpc_port=None if no_grpc else grpc_port,
        token=read_token(token_file) if token_file else os.environ.get(_TOKEN) or None,
        admin_token=read_token(admin_token_file) if admin_token_file else os.environ.get(_ADMIN_TOKEN) or None,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
        limits=Limits(request_bytes=max_request_mb << 20, image_pixels=max_pixels, body_s=body_s),
        stop_delay_s=stop_delay_s,
        drain_s=drain_s,
        log_requests=log_requests,
    )
    placed = {
        "replicas": replicas,
        "max_replicas": max_replicas,
        "replicas_per_node": replicas_per_node,
        "target_requests": target_requests,
        "replica_cpus": replica_cpus,
        "replica_gpus": replica_gpus,
        "detach": detach or None,
    }
    given: dict[str, Any] = {name: value for name, value in placed.items() if value is not None}
    if address is None and given:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} needs --ray")
    if address is not None:
        if click.get_current_context().get_parameter_source("grpc_port") is ParameterSource.COMMANDLINE:
            raise UsageError("--ray serves over REST alone: leave --grpc-port out")
        on = RayOptions(address=address or None, **given)
    if not models:
        raise UsageError("Missing argument 'ARTIFACT|NAME=PATH[@VERSION]...'.")
    sources = [ModelSource.parse(text) for text in models]
    model_options = ModelOptions(backend=backend, device=device, threads=threads, batching=batching)
    if address is not None:
        from deploy.serving.ray_serve import serve_on_ray

        return serve_on_ray(sources, model_options, options, on)
    from deploy.serving.server import serve

    return serve(sources, model_options, options)
