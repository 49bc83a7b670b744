"""What this machine is and what runs on it: the conditions of a measurement. Loads none of the libraries it names."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from deploy.machine import cpu_model, usable_cores

LIBRARIES = ("torch", "onnxruntime", "openvino")


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
        "device": device,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "versions": versions(),
    }
