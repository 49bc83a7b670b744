"""The fastest backend for an artifact on this machine: timed once, each in its own process, and remembered."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import request_digest
from deploy.artifact.tensors import default_dims
from deploy.errors import BackendError
from deploy.evidence.disturbance import Measured, Round, Turn, take_rounds, take_turn
from deploy.host.cache import cache_folder, keep
from deploy.host.cpu import cpu_model, usable_cores
from deploy.host.versions import versions
from deploy.runtime.catalog import AUTO, LIBRARIES, auto_order, refuse_compiled
from deploy.runtime.session import SessionOptions
from deploy.runtime.worker.process import WorkerProcess

logger = logging.getLogger(__name__)

_ROUNDS = 5
_SLICE_S = 0.1
_SAMPLES = 500


def fastest_file() -> Path:
    """The file that holds the choices of `fastest`: `deploy/fastest.json` in $XDG_CACHE_HOME, or in ~/.cache."""
    return cache_folder() / "fastest.json"


def fastest_backend(artifact: Artifact, options: SessionOptions) -> str:
    """The backend remembered for this artifact on this machine, else the one that is fastest now.

    Where other programs disturb the measurement, it is the first of `auto_order` that can run the artifact, which is warned of and not
    remembered.
    """
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
    measured = _time(artifact, auto_order(artifact), options, dims)
    disturbed = next((name for name in measured.rounds[0] if not measured.certain(name)), None)
    if disturbed is not None and len(measured.rounds[0]) > 1:
        first = next(iter(measured.rounds[0]))
        logger.warning(
            "which backend is fastest for %s cannot be measured now: %s; %s is taken, the first in the order of auto, until it is opened"
            " on a quieter machine",
            artifact.shown,
            measured.reason(disturbed),
            first,
        )
        return first
    medians = {name: float(np.median(np.concatenate(measured.samples_s(name)))) * 1e3 for name in measured.rounds[0]}
    best = min(medians, key=lambda name: medians[name])
    _write({**_read(), key: {**circumstances, "backend": best, "p50_ms": medians}})
    return best


def _time(artifact: Artifact, backends: Sequence[str], options: SessionOptions, dims: Mapping[str, int]) -> Measured[str]:
    """The runs of the artifact on each backend that can run it here, measured in turns, in the order of `backends`.

    `dims` are the sizes of the symbolic dimensions. Disturbed rounds are taken again (`take_rounds`). Raises BackendError if no
    backend can.
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
        rounds: list[Round[str]] = []
        take_rounds(lambda _: Round({name: _turn(worker) for name, worker in workers.items()}), _ROUNDS, rounds)
    return Measured.of(rounds, _ROUNDS)


def _turn(worker: WorkerProcess) -> Turn:
    return take_turn(worker.pid, worker.threads, lambda: worker.round(_SLICE_S, _SAMPLES))


def _read() -> dict[str, Any]:
    """The choices in the file; none if it is missing or damaged, since they can be measured again."""
    try:
        value = json.loads(fastest_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(choices: dict[str, Any]) -> None:
    keep(fastest_file(), json.dumps(choices, indent=1).encode(), "the choice of the fastest backend")
