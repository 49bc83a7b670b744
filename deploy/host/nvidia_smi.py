"""What nvidia-smi reports about the GPUs."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

_EVERY_MS = 500

_BUS_ID_BYTES = 13  # cuDeviceGetPCIBusId: "0000:00:00.0" and the zero behind it


def query(kind: str, fields: Sequence[str], *options: str) -> list[dict[str, str]]:
    """The rows of `nvidia-smi --query-KIND=FIELDS`, by field; numbers are without units.

    Raises BackendError when nvidia-smi is not installed, fails, or answers something else.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        raise BackendError("no NVIDIA driver here (nvidia-smi is not installed): engines can be built with tensorrt-rtx, not run")
    asked = [command, *_query(kind, fields), *options]
    try:
        output = subprocess.run(asked, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendError(f"nvidia-smi failed: {error}") from error
    return _rows(output, fields)


def _query(kind: str, fields: Sequence[str]) -> list[str]:
    return [f"--query-{kind}={','.join(fields)}", "--format=csv,noheader,nounits"]


def _rows(output: str, fields: Sequence[str]) -> list[dict[str, str]]:
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


def gpu_state(device: str = "cuda") -> dict[str, str] | None:
    """Name, driver, clocks, temperature, power and throttling of `device`, `cuda` or `cuda:N`, now; None without one."""
    try:
        rows = query("gpu", tuple(_STATE), f"--id={_identity(device)}")
    except BackendError:
        return None
    return _state(rows[0]) if rows else None


@contextmanager
def gpu_watched(device: str | None, states: list[dict[str, str]]) -> Iterator[None]:
    """Add to `states` what the states of `device` were during the block, as of `gpu_state`, two a second.

    What holds the clocks back shows only while there is work: before and after it, the GPU idles. Nothing is added where `device`
    is None or there is no nvidia-smi.
    """
    command = shutil.which("nvidia-smi")
    if device is None or command is None:
        yield
        return
    asked = [command, *_query("gpu", tuple(_STATE)), f"--id={_identity(device)}", f"--loop-ms={_EVERY_MS}"]
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(asked, stdout=output, stderr=subprocess.DEVNULL) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            process.wait()
            output.seek(0)
            whole = [line for line in output if line.endswith("\n") and line.count(",") == len(_STATE) - 1]
            states += [_state(row) for row in _rows("".join(whole), tuple(_STATE))]


def summed_up(states: Sequence[dict[str, str]]) -> dict[str, Any] | None:
    """What `gpu_watched` saw: how often it looked and how often something held the clocks back, and the ends of its numbers.

    `throttling` has all reasons together, in hexadecimal as nvml.h numbers them. None where there are no states.
    """
    if not states:
        return None
    found: dict[str, Any] = {"looks": len(states), "throttled": sum(map(throttled, states)), "throttling": 0}
    for state in states:
        if throttled(state):
            found["throttling"] |= int(state["throttling"], 16)
    found["throttling"] = hex(found["throttling"])
    for key, end, choose in (("sm_mhz", "least", min), ("sm_mhz", "most", max), ("celsius", "most", max), ("watts", "most", max)):
        if numbers := [float(state[key]) for state in states if state[key].replace(".", "", 1).isdecimal()]:
            found[f"{key}_{end}"] = choose(numbers)
    return found


def _state(row: dict[str, str]) -> dict[str, str]:
    return {key: row[field] for field, key in _STATE.items()}


def _identity(device: str) -> str:
    """What nvidia-smi calls the GPU that is `device` for CUDA: its PCI bus id, from the driver.

    CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER change the numbers of CUDA, and not those of nvidia-smi.
    """
    index = int(device.partition(":")[2] or 0)
    number, name = ctypes.c_int(), ctypes.create_string_buffer(_BUS_ID_BYTES)
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return str(index)
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(number), index)
    failed = failed or cuda.cuDeviceGetPCIBusId(name, _BUS_ID_BYTES, number)
    return str(index) if failed else name.value.decode()


def throttled(state: dict[str, str]) -> bool:
    """Whether something holds the GPU's clocks back, by the mask of `gpu_state`."""
    try:
        return bool(int(state["throttling"], 16) & ~_IDLE_BITS)
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
