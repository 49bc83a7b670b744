"""What this machine is and what runs on it: the conditions of a measurement. Loads none of the libraries it names."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from deploy.host.cpu import cache_bytes, cpu_model, governor, usable_cores

LIBRARIES = ("deploy", "torch", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")

_QUERY = {
    "name": "name",
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "clocks_event_reasons.active": "throttling",
}
"""What nvidia-smi is asked for, and the key it is kept by; `throttling` is the bit mask of the reasons, in hexadecimal."""

_IDLE_BITS = 0x1 | 0x2
"""nvmlClocksEventReasonGpuIdle and ...ApplicationsClocksSetting of nvml.h: nothing holds the clocks back."""


def versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str | None]:
    """Version of Python and of each installed distribution; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            # The GPU build of ONNX Runtime is another distribution of the same module.
            found[name] = _version_or_none("onnxruntime-gpu") if name == "onnxruntime" else None
    return found


def _version_or_none(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


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
        "gpu": gpu_state() if device != "cpu" else None,
        "revision": revision(),
        "versions": versions(),
    }


def gpu_state() -> dict[str, str] | None:
    """Name, driver, clocks, temperature, power and throttling of the first GPU now; None where nvidia-smi does not say."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(_QUERY.values(), values, strict=True))


def throttled(state: dict[str, str] | None) -> bool:
    """Whether something holds the GPU's clocks back, by the mask of `gpu_state`."""
    try:
        return state is not None and bool(int(state["throttling"], 16) & ~_IDLE_BITS)
    except ValueError:  # [N/A]
        return False


def revision(folder: Path | None = None) -> str | None:
    """The git revision of the user's current folder, with `+` where files differ from it; None where there is none."""
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
