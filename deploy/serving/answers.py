"""The answers that both doors give alike: the description of a model, its configuration, its statistics, and the status of an error."""

from collections.abc import Sequence
from typing import Any

from deploy.artifact.tensors import TensorSpec, batch_dim
from deploy.errors import (
    DataError,
    DeadlineError,
    DeployError,
    InputError,
    ModelNotFoundError,
    QueueFullError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from deploy.serving.models import Served
from deploy.serving.regions import Regions
from deploy.serving.request import DATATYPES

EXTENSIONS = (
    "binary_tensor_data", "classification", "classify_image", "detect_image", "metrics", "model_configuration", "model_repository",
    "model_repository(unload_dependents)", "parameters", "schedule_policy", "segment_image", "statistics",
)  # fmt: skip


def extensions(regions: Regions) -> list[str]:
    """What the server can beyond the protocol."""
    return sorted((*EXTENSIONS, "system_shared_memory")) if regions.on else list(EXTENSIONS)


def metadata(served: Served, versions: Sequence[str]) -> dict[str, Any]:
    """The answer of `GET /v2/models/M`, of which `versions` are loaded."""

    def listed(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": _sizes(spec.shape)} for spec in specs]

    return {
        "name": served.source.name,
        "versions": list(versions),
        "platform": _platform(served),
        "inputs": listed(served.inputs),
        "outputs": listed(served.outputs),
    }


def config(served: Served) -> dict[str, Any]:
    """The answer of `GET /v2/models/M/config`: the fields of Triton's model configuration that have a meaning here."""
    most = served.batcher.max_rows
    batched = most is not None and batch_dim(served.inputs) is not None

    def listed(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "data_type": f"TYPE_{DATATYPES[spec.dtype]}",
                "dims": _sizes(spec.shape[1:] if batched else spec.shape),
            }
            for spec in specs
        ]

    options = served.batcher.options
    document = {
        "name": served.source.name,
        "platform": _platform(served),
        "backend": served.session.backend,
        "version_policy": {"specific": {"versions": [int(served.source.version)]}},
        "max_batch_size": most or 0,
        "input": listed(served.inputs),
        "output": listed(served.outputs),
        "instance_group": [
            {
                "kind": "KIND_CPU" if served.session.device == "cpu" else "KIND_GPU",
                "count": options.instances or served.session.concurrency,
            }
        ],
        "parameters": {"precision": {"string_value": served.artifact.manifest.precision}},
    }
    if most is not None:
        document["dynamic_batching"] = {
            "preferred_batch_size": [],
            "max_queue_delay_microseconds": round(options.delay_ms * 1e3),
            "default_queue_policy": {"max_queue_size": options.queue_rows},
        }
    return document


def statistics(served: Served) -> dict[str, Any]:
    """One entry of the answer of `GET /v2/models/M/stats`."""
    counts = served.meter.counts()

    def duration(step: str) -> dict[str, int]:
        return {"count": counts.success, "ns": counts.duration_ns[step]}

    return {
        "name": served.source.name,
        "version": served.source.version,
        "inference_count": counts.inferences,
        "execution_count": counts.executions,
        "inference_stats": {
            "success": duration("request"),
            "fail": {"count": sum(counts.failures.values()), "ns": counts.failed_ns},
            "queue": duration("queue"),
            "compute_input": duration("compute_input"),
            "compute_infer": duration("compute_infer"),
            "compute_output": duration("compute_output"),
        },
    }


def _platform(served: Served) -> str:
    return f"deploy_{served.session.backend.replace('-', '_')}"


def _sizes(shape: Sequence[int | str]) -> list[int]:
    """A shape in the protocol's notation: -1 for a dynamic dimension."""
    return [-1 if isinstance(dim, str) else dim for dim in shape]


def status_of(error: Exception) -> int:
    """The HTTP status of an error."""
    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, ModelNotFoundError):
        return 404
    if isinstance(error, InputError | UsageError | DataError):
        return 400
    if isinstance(error, QueueFullError | UnavailableError | DeadlineError):
        return 503
    return 500


def text_of(error: Exception) -> str:
    """What the client reads about an error: the message of one of ours, and nothing about the inside of the server for a bug."""
    return str(error) if isinstance(error, DeployError) else "an error in the server; its log says more"


def refuse_one_of_several() -> RefusedError:
    """The error for loading or unloading a model where there are other servers behind the same address."""
    return RefusedError(403, "this is one replica of several: to load models anew, deploy again")
