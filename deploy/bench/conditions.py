"""The conditions of a measurement: the machine, its load and the versions in use. Loads none of the libraries it names."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.host.cpu import cache_bytes, cpu_model, governor, usable_cores
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
        "threads": threads,
        "cache_bytes": cache_bytes(),
        "governor": governor(),
        "device": device,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "gpu": gpu_state(device) if device != "cpu" else None,
        "revision": revision(),
        "versions": versions(LIBRARIES),
    }


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
