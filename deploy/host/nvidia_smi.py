"""What nvidia-smi reports about the GPUs."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from deploy.errors import BackendError

_STATE = {
    "name": "name",
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "clocks_event_reasons.active": "throttling",
}
"""Fields of nvidia-smi and their keys in `gpu_state`; `throttling` is the bit mask of the reasons, in hexadecimal."""

_LISTED = ("name", "compute_cap", "memory.total", "driver_version")

_IDLE_BITS = 0x1 | 0x2
"""nvmlClocksEventReasonGpuIdle and ...ApplicationsClocksSetting of nvml.h: nothing holds the clocks back."""

_TIMEOUT_S = 20


def query(kind: str, fields: Sequence[str], *options: str) -> list[dict[str, str]]:
    """The rows of `nvidia-smi --query-KIND=FIELDS`, by field; numbers are without units.

    Raises BackendError when nvidia-smi is not installed, fails, or answers something else.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        raise BackendError("no NVIDIA driver here (nvidia-smi is not installed): engines can be built with tensorrt-rtx, not run")
    asked = [command, f"--query-{kind}={','.join(fields)}", "--format=csv,noheader,nounits", *options]
    try:
        output = subprocess.run(asked, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendError(f"nvidia-smi failed: {error}") from error
    rows = []
    for line in output.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(fields):
            raise BackendError(f"nvidia-smi failed: it answered {line!r} when asked for {', '.join(fields)}")
        rows.append(dict(zip(fields, values, strict=True)))
    return rows


def gpu_peak_bytes() -> int | None:
    """GPU memory that this process uses, according to the driver; None without a GPU or where the driver does not report it.

    After the runs of a benchmark this is the peak: the allocators of torch, TensorRT and ONNX Runtime keep their memory.
    """
    try:
        rows = query("compute-apps", ("pid", "used_memory"))
    except BackendError:
        return None
    ours = [row["used_memory"] for row in rows if row["pid"] == str(os.getpid())]
    return sum(int(mib) << 20 for mib in ours if mib.isdecimal()) or None


def gpu_state() -> dict[str, str] | None:
    """Name, driver, clocks, temperature, power and throttling of the first GPU now; None without one."""
    try:
        rows = query("gpu", tuple(_STATE), "--id=0")
    except BackendError:
        return None
    return {key: rows[0][field] for field, key in _STATE.items()} if rows else None


def throttled(state: dict[str, str] | None) -> bool:
    """Whether something holds the GPU's clocks back, by the mask of `gpu_state`."""
    try:
        return state is not None and bool(int(state["throttling"], 16) & ~_IDLE_BITS)
    except ValueError:  # [N/A]
        return False


def list_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs, and the reason when there are none. `memory_mib` is None where the driver does not report it."""
    try:
        rows = query("gpu", _LISTED)
    except BackendError as error:
        return [], str(error)
    gpus = [
        {
            "name": row["name"],
            "compute_capability": row["compute_cap"],
            "memory_mib": int(row["memory.total"]) if row["memory.total"].isdecimal() else None,
            "driver": row["driver_version"],
        }
        for row in rows
    ]
    return gpus, None if gpus else "nvidia-smi lists no GPU"
