"""The conditions of a measurement: the machine, its load and the versions in use. Loads none of the libraries it names."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.evidence.disturbance import LIMIT, Use, fewer_threads, together, unmeasured
from deploy.host.core_probe import CoreState
from deploy.host.cpu import cache_bytes, cpu_model, governor, usable_cores
from deploy.host.cpu_limit import cpu_limit
from deploy.host.nvidia_smi import gpu_state
from deploy.host.versions import versions
from deploy.runtime.catalog import LIBRARIES


def conditions(*, threads: int, device: str) -> dict[str, Any]:
    """The JSON-able conditions of a measurement that starts now."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "cpu_limit": cpu_limit(),
        "threads": threads,
        "cache_bytes": cache_bytes(),
        "governor": governor(),
        "device": device,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "gpu": gpu_state(device) if device != "cpu" else None,
        "revision": revision(),
        "versions": versions(LIBRARIES),
    }


def disturbance(uses: Sequence[Use], repeated: int, cores: Sequence[CoreState]) -> dict[str, Any]:
    """What other programs did in the rounds, JSON-able.

    uses: by batch size. repeated: the rounds that were taken in the place of others. cores: as they were for each batch size.
    step_ns, handoff_us: the least and the most of them; None if not known. others_cores: of `cores`, on average; fewer_threads: so many `threads` would leave them free, None where that does not help.
    limit: the share of the time that others may take. not_measured: what this machine does not tell, in words.
    """
    whole = together(uses)
    return {
        "others_cores": whole.others_cores,
        "waited_share": whole.waited_share,
        "cores": whole.cores,
        "limit": LIMIT,
        "repeated_rounds": repeated,
        "step_ns": _ends(state.step_ns for state in cores),
        "handoff_us": _ends(state.handoff_us for state in cores),
        "fewer_threads": fewer_threads(whole),
        "not_measured": unmeasured(whole),
    }


def _ends(values: Iterable[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None


def revision(folder: Path | None = None) -> str | None:
    """The git revision of the user's current folder, with `+` if files differ from it; None outside a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    where = ["-C", str(folder)] if folder else []
    try:
        head = subprocess.run([git, *where, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = [git, *where, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
