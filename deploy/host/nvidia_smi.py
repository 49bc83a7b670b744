"""What nvidia-smi reports of the GPUs."""

import os
import shutil
import subprocess
from typing import Any

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

_LISTED = ("name", "compute_cap", "memory.total", "driver_version")

_IDLE_BITS = 0x1 | 0x2
"""nvmlClocksEventReasonGpuIdle and ...ApplicationsClocksSetting of nvml.h: nothing holds the clocks back."""


def gpu_peak_bytes() -> int | None:
    """GPU memory that this process has in use, as the driver tells; None where there is none.

    After its runs that is the peak: the allocators of torch, TensorRT and ONNX Runtime keep what they once had.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(",") for line in done.stdout.splitlines()]
    used = [
        int(row[1]) << 20 for row in rows if len(row) == 2 and row[0].strip() == str(os.getpid()) and row[1].strip().isdecimal()
    ]
    return sum(used) or None


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


def list_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """GPUs as nvidia-smi lists them, and why there are none."""
    if shutil.which("nvidia-smi") is None:
        return [], "no NVIDIA driver here (nvidia-smi is not installed): engines can be built with tensorrt-rtx, not run"
    command = ["nvidia-smi", f"--query-gpu={','.join(_LISTED)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (subprocess.SubprocessError, OSError) as error:
        return [], f"nvidia-smi failed: {error}"
    gpus = []
    for line in output.splitlines():
        name, capability, memory, driver = [part.strip() for part in line.split(",")]
        gpus.append({"name": name, "compute_capability": capability, "memory_mib": int(memory), "driver": driver})
    return gpus, None if gpus else "nvidia-smi lists no GPU"
