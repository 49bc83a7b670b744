"""`deploy serve`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from deploy.cli.common import backend_option, debug_option, device_option, threads_option
from deploy.cli.options import PATH, options
from deploy.errors import UsageError
from deploy.options import collect, option_names
from deploy.runtime.batching.batcher import BatcherOptions
from deploy.serving.guard import Limits, read_token
from deploy.serving.models import ModelOptions
from deploy.serving.options import RayOptions, ServerOptions
from deploy.serving.source import ModelSource

_TOKEN = "DEPLOY_TOKEN"  # noqa: S105  (the name of a variable)
_ADMIN_TOKEN = "DEPLOY_ADMIN_TOKEN"  # noqa: S105


@click.command("serve")
@click.argument("models", nargs=-1, metavar="ARTIFACT|NAME=PATH[@VERSION]...")
@options(ServerOptions)
@click.option("--no-http", is_flag=True, help="No REST door.")
@click.option("--no-grpc", is_flag=True, help="No gRPC door.")
@click.option("--token-file", type=PATH, metavar="FILE", help=f"Token that requests must bear.  [default: ${_TOKEN}, else none]")
@click.option(
    "--admin-token-file", type=PATH, metavar="FILE", help=f"Token of load, unload and index.  [default: ${_ADMIN_TOKEN}]"
)
@options(BatcherOptions)
@click.option(
    "--max-request-mb", type=click.IntRange(min=1), default=64, show_default=True, metavar="MB", help="The largest request."
)
@options(Limits)
@click.option(
    "--ray",
    "address",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Serve on the Ray cluster at ADDRESS, and over gRPC where --grpc-port is given; `local` starts Ray here.  [without ADDRESS: this machine's cluster, or local]",
)
@options(RayOptions)
@options(ModelOptions)
@backend_option
@device_option
@threads_option
@debug_option
def command(models: tuple[str, ...], address: str | None, **given: Any) -> int:
    """Serve artifacts over the Open Inference Protocol v2, REST and gRPC, with dynamic batching.

    A model is called like its artifact unless NAME= says otherwise. Logs go to standard error, a line of JSON each.
    """
    server = _server_options(given, on_ray=address is not None)
    ray = _ray_options(address, given)
    if not models:
        raise UsageError("Missing argument 'ARTIFACT|NAME=PATH[@VERSION]...'.")
    sources = [ModelSource.parse(text) for text in models]
    opened = collect(
        ModelOptions,
        given,
        backend=given["backend"],
        device=given["device"],
        threads=given["threads"],
        batching=collect(BatcherOptions, given),
    )
    if ray is not None:
        from deploy.serving.ray_serve import serve_on_ray  # loads Ray

        return serve_on_ray(sources, opened, server, ray)
    from deploy.serving.server import serve  # loads uvicorn and gRPC

    return serve(sources, opened, server)


def _server_options(given: dict[str, Any], *, on_ray: bool) -> ServerOptions:
    """on_ray: the gRPC door, which is open to other machines there, is opened where its port is typed."""
    doors = {"http_port": None} if given["no_http"] else {}
    source = click.get_current_context().get_parameter_source
    shut = given["no_grpc"] or (on_ray and source("grpc_port") is not ParameterSource.COMMANDLINE)
    doors |= {"grpc_port": None} if shut else {}
    return collect(
        ServerOptions,
        {**given, **doors},
        token=_token(given["token_file"], _TOKEN),
        admin_token=_token(given["admin_token_file"], _ADMIN_TOKEN),
        limits=replace(collect(Limits, given), request_bytes=given["max_request_mb"] << 20),
    )


def _token(file: Path | None, variable: str) -> str | None:
    return read_token(file) if file else os.environ.get(variable) or None


def _ray_options(address: str | None, given: dict[str, Any]) -> RayOptions | None:
    """None without `--ray`. Raises UsageError for options that do not fit together."""
    source = click.get_current_context().get_parameter_source
    if address is None:
        if typed := [name for name in option_names(RayOptions) if source(name) is ParameterSource.COMMANDLINE]:
            raise UsageError(f"`{typed[0]}` needs --ray")
        return None
    return collect(RayOptions, given, address=address or None)
