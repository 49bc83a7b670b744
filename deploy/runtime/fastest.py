"""The fastest backend for an artifact on this machine: timed once, each in its own process, and remembered."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import request_digest
from deploy.artifact.tensors import default_dims
from deploy.errors import BackendError
from deploy.host.cache import cache_folder, keep
from deploy.host.cpu import cpu_model, usable_cores
from deploy.host.versions import versions
from deploy.runtime.catalog import AUTO, LIBRARIES, refuse_compiled
from deploy.runtime.session import SessionOptions
from deploy.runtime.worker.process import WorkerProcess

_ROUNDS = 5
_SLICE_S = 0.1
_SAMPLES = 500


def fastest_file() -> Path:
    """The file that holds the choices of `fastest`: `deploy/fastest.json` in $XDG_CACHE_HOME, or in ~/.cache."""
    return cache_folder() / "fastest.json"


def fastest_backend(artifact: Artifact, options: SessionOptions) -> str:
    """The backend remembered for this artifact on this machine, else the one that is fastest now."""
    refuse_compiled(artifact)
    circumstances = {
        "artifact": artifact.manifest.digest,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": options.threads,
        "device": options.device,
        "compute": options.compute,
        "versions": versions(LIBRARIES),
    }
    key = request_digest(circumstances)
    entry = _read().get(key)
    if isinstance(entry, dict) and entry.get("backend") in AUTO:
        return str(entry["backend"])
    manifest = artifact.manifest
    image = manifest.preprocess.shape if manifest.preprocess else None
    remedy = "name a backend in place of fastest"
    dims = default_dims(manifest.inputs, manifest.profiles, image, known={}, remedy=remedy)
    medians = _time(artifact, AUTO, options, dims)
    best = min(medians, key=lambda name: medians[name])
    _write({**_read(), key: {**circumstances, "backend": best, "p50_ms": medians}})
    return best


def _time(artifact: Artifact, backends: Sequence[str], options: SessionOptions, dims: Mapping[str, int]) -> dict[str, float]:
    """The median time of a run, in milliseconds, on each backend that can run the artifact here, measured in turns.

    `dims` are the sizes of the symbolic dimensions.

    Raises BackendError if none can.
    """
    reasons = []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(WorkerProcess(artifact, name, options)) for name in backends}
        for name, worker in list(workers.items()):
            try:
                worker.wait_open()
                worker.prepare(dims)
            except BackendError as error:
                reasons.append(f"{name}: {error}")
                workers.pop(name).close()
        if not workers:
            raise BackendError(f"no backend can run {artifact.shown} here: " + "; ".join(reasons))
        samples: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(_ROUNDS):
            for name, worker in workers.items():
                samples[name] += worker.round(_SLICE_S, _SAMPLES)
    return {name: float(np.median(values)) * 1e3 for name, values in samples.items()}


def _read() -> dict[str, Any]:
    """The choices in the file; none if it is missing or damaged, since they can be measured again."""
    try:
        value = json.loads(fastest_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(choices: dict[str, Any]) -> None:
    keep(fastest_file(), json.dumps(choices, indent=1).encode(), "the choice of the fastest backend")
