"""What this machine is and what runs on it: the conditions of a measurement. Loads none of the libraries it names."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "onnxruntime", "openvino")


def cpu_model() -> str:
    """Name of the processor, as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Physical cores that this process may use, less where a control group allows less time.

    What torch, ONNX Runtime and OpenVINO take as their number of threads differs; a fair comparison sets it.
    """
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota(len(cpus))))


def _siblings(cpu: int) -> str:
    """The logical CPUs that share a core with `cpu`; itself where the kernel does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota(default: int) -> int:
    """CPUs' worth of time that the control group (version 2) allows; `default` where there is no limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return default
    return default if limit == "max" else -(-int(limit) // int(period))


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
