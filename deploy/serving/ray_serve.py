"""Both doors on a Ray cluster: `deploy serve` as one ingress deployment of Ray Serve.

Ray places, scales and restarts the replicas, and routes the requests. Every replica opens the artifacts, from the same paths on all
nodes, and makes its own batches.
"""

import contextlib
import logging
import signal
import threading
import time
from dataclasses import replace
from typing import Any

try:
    import ray
    from ray import serve as ray_serve
except ImportError as error:  # Ray without its extra `serve` lacks one of several libraries: all come with ours
    raise ImportError(str(error), name="ray") from error

from deploy.artifact.find import open_artifact
from deploy.errors import BackendError, UsageError
from deploy.serving.log import log_as_json
from deploy.serving.models import ModelOptions, Models, check_code
from deploy.serving.options import RayOptions, ServerOptions
from deploy.serving.ray_replica import SERVICES, Replica
from deploy.serving.source import ModelSource

logger = logging.getLogger("deploy.serving")

APP = "deploy"
"""The name of the application on the cluster. An application that has this name already is replaced, replica by replica."""

_NOTE = "deploy-doors"
_START_ATTEMPTS = 3
_LOOK_S = 1.0
_DOORS_S = 120.0


def serve_on_ray(sources: list[ModelSource], models: ModelOptions, options: ServerOptions, on: RayOptions) -> int:
    """Deploy, wait until the replicas are ready, and stay until SIGTERM or SIGINT unless detached; the exit status.

    The log goes to standard error as JSON. Raises ArtifactError if an artifact on this machine is damaged, UsageError, and
    BackendError if the cluster cannot be reached or no replica starts.
    """
    log_as_json("ray", "ray.serve")
    sources = [replace(source, path=source.path.resolve()) for source in sources]
    app = application(sources, models, options, on)
    for source in sources:
        artifact = open_artifact(source.path)
        check_code(artifact, models)
        artifact.verify(weights=False)
    _connect(on)
    stop = threading.Event()
    # After `_connect`, because Ray replaces signal handlers with its own.
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        doors = _open_doors(options)
        ready = _deploy(app, stop)
        for door, address in doors.items() if ready else ():
            fields = {"door": door, "address": address, "models": list(dict.fromkeys(source.name for source in sources))}
            logger.info("serving", extra=fields)
        if not (ready and on.detach):
            stop.wait()
            logger.info("stopping")
            ray_serve.delete(APP)
            logger.info("stopped")
    finally:
        ray.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def application(sources: list[ModelSource], models: ModelOptions, options: ServerOptions, on: RayOptions) -> Any:
    """The argument of `ray.serve.run`: one ingress deployment, whose replicas serve all of `sources`.

    Raises UsageError for options that do not work on a cluster.
    """
    if options.http_port is None:
        raise UsageError("Ray always serves over REST: give `http_port` (leave out `no_http`)")
    if 0 in (options.http_port, options.grpc_port):
        raise UsageError("`http_port` and `grpc_port` cannot be 0 on Ray, which opens the same port on every node")
    if options.grpc_port is not None and options.tls_cert is not None:
        raise UsageError("the gRPC door of Ray takes no certificate: leave out `grpc_port`, or `tls_cert` and `tls_key`")
    if options.grpc_port is not None and options.token is None and not options.insecure:
        raise UsageError(
            "Ray opens the gRPC door to other machines, whatever `host` is: give it a token (`token_file`), or say `insecure`"
        )
    if options.shared_memory:
        raise UsageError("`shared_memory` is of one machine: a replica may be on another than its client")
    for name in ("connections", "connections_per_address"):
        if getattr(options, name) != getattr(ServerOptions, name):
            raise UsageError(f"`{name}` cannot be set on Ray, which opens the doors")
    if options.admin_token is not None:
        raise UsageError("there are no admin calls on Ray: deploy again to load the models anew; no request is lost")
    Models(sources, models)  # raises UsageError for a name and version that is given twice
    if models.threads is None and on.replica_cpus >= 1:
        models = replace(models, threads=int(on.replica_cpus))

    if on.max_replicas is None or on.max_replicas == on.replicas:
        scale: dict[str, Any] = {"num_replicas": on.replicas}
    else:
        scale = {
            "autoscaling_config": {
                "min_replicas": on.replicas,
                "max_replicas": on.max_replicas,
                "target_ongoing_requests": on.target_requests,
            }
        }
    if on.replicas_per_node is not None:
        scale["max_replicas_per_node"] = on.replicas_per_node
    deployment = ray_serve.deployment(
        name="models",
        ray_actor_options={"num_cpus": on.replica_cpus, "num_gpus": on.replica_gpus},
        max_ongoing_requests=models.batching.queue_rows,  # the batcher refuses requests beyond
        graceful_shutdown_timeout_s=options.drain_s,
        graceful_shutdown_wait_loop_s=max(options.stop_delay_s, 0.1),
        max_constructor_retry_count=_START_ATTEMPTS,
        # Several replicas are replaced one by one. A single replica stays until its successor is ready, which needs room for both.
        max_surge_percent=100 if on.replicas == 1 and on.replicas_per_node is None else 0,
        **scale,
    )
    return deployment(ray_serve.ingress()(Replica)).bind(sources, models, options)


def _connect(on: RayOptions) -> None:
    try:
        ray.init(address=on.address, configure_logging=False, log_to_driver=False)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError and others
        raise BackendError(f"cannot reach the Ray cluster {on.address or 'of this machine'}: {_one_line(error)}") from error


def _open_doors(options: ServerOptions) -> dict[str, str]:
    """Start Ray Serve unless it runs already; the addresses of its proxies, by door."""
    wanted = {
        "host": options.host,
        "port": options.http_port,
        "grpc_port": options.grpc_port,
        "tls_cert": None if options.tls_cert is None else str(options.tls_cert.resolve()),
        "tls_key": None if options.tls_key is None else str(options.tls_key.resolve()),
    }
    tls = {"ssl_certfile": wanted["tls_cert"], "ssl_keyfile": wanted["tls_key"]}
    try:
        # If Ray Serve runs already it keeps its address and ignores ours. The rules of access would then be those for an address
        # that is not the real one, so that is refused.
        if ray_serve.status().proxies:
            _check_note(wanted)
        else:
            _leave_note(wanted)
            try:
                ray_serve.start(
                    proxy_location="EveryNode",
                    http_options={
                        "host": options.host,
                        "port": options.http_port,
                        "keep_alive_timeout_s": max(1, round(options.keep_alive_s)),
                        **tls,
                    },
                    grpc_options=None
                    if options.grpc_port is None
                    else {"port": options.grpc_port, "grpc_servicer_functions": [SERVICES], "enable_reflection": False},
                )
            except TimeoutError:  # Ray gives its doors 60 s, which are few on a busy machine: they are still opening
                _wait_for_doors()
    except UsageError:
        raise
    except Exception as error:
        raise BackendError(f"Ray Serve did not start: {_one_line(error)}") from error
    scheme = "https" if options.tls_cert else "http"
    doors = {"http": f"{scheme}://{f'[{options.host}]' if ':' in options.host else options.host}:{options.http_port}"}
    if options.grpc_port is not None:
        doors["grpc"] = f"0.0.0.0:{options.grpc_port}"
    return doors


class _Note:
    """An actor that remembers where the doors were opened, for the next `deploy serve` on this cluster."""

    def __init__(self, doors: dict[str, Any]) -> None:
        self._doors = doors

    def doors(self) -> dict[str, Any]:
        return self._doors


def _leave_note(wanted: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError):  # there was none
        ray.kill(ray.get_actor(_NOTE, namespace=_NOTE))
        time.sleep(_LOOK_S)
    note = ray.remote(_Note).options(name=_NOTE, namespace=_NOTE, lifetime="detached", num_cpus=0).remote(wanted)
    ray.get(note.doors.remote())


def _check_note(wanted: dict[str, Any]) -> None:
    """Raise UsageError unless Ray Serve was started by `deploy serve`, with the same doors."""
    try:
        running = ray.get(ray.get_actor(_NOTE, namespace=_NOTE).doors.remote())
    except (ValueError, ray.exceptions.RayError):
        raise UsageError(
            "Ray Serve runs on this cluster, and was not started by `deploy serve`: its address is not known; run `serve shutdown` first"
        ) from None
    for name, value in wanted.items():
        if running.get(name) != value:
            raise UsageError(
                f"Ray Serve runs on this cluster with {name} {running.get(name)}, not {value}, and cannot change it: say the same"
                " `host`, `http_port`, `grpc_port`, `tls_cert` and `tls_key`, or run `serve shutdown` first"
            )


def _wait_for_doors() -> None:
    """Wait until the door of every node is open. Raises TimeoutError."""
    end = time.monotonic() + _DOORS_S
    while not (doors := ray_serve.status().proxies) or any(state != "HEALTHY" for state in doors.values()):
        if time.monotonic() > end:
            raise TimeoutError(f"the doors did not open in {_DOORS_S:g} s: {doors}")
        time.sleep(_LOOK_S)


def _deploy(app: Any, stop: threading.Event) -> bool:
    """Deploy; whether the replicas are ready, or `stop` came first. Meanwhile the log reports what Ray is waiting for."""
    failed: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            ray_serve.run(app, name=APP)
        except Exception as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True, name="deploy-ray").start()
    logged = ""
    while not done.wait(_LOOK_S) and not stop.is_set():
        if (now := _state()) and now != logged:
            logger.info("deploying", extra={"state": now})
            logged = now
    if failed:
        raise BackendError(f"the models did not start on Ray: {_state() or _one_line(failed[0])}") from failed[0]
    return done.is_set()


def _state() -> str:
    """Ray's message about the deployment. A traceback is cut down to its first line and its last, which names the error."""
    try:
        status = ray_serve.status().applications.get(APP)
    except Exception as error:  # its controller is busy, or gone
        return f"Ray does not answer: {_one_line(error)}"
    shown = []
    for message in [deployment.message for deployment in status.deployments.values()] if status else []:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        shown.append(lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}" if lines else "")
    return " ".join(shown)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
