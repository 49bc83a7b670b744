"""What this machine can do: processor, GPUs, driver, and each library with its version or what is missing."""

import importlib
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

from deploy.errors import BackendError, DeployError
from deploy.machine import cpu_model, usable_cores
from deploy.runtime.session import BACKENDS

_QUERY = ("name", "compute_cap", "memory.total", "driver_version")


def examine() -> dict[str, Any]:
    """A JSON-like report.

    `backends` and `flavours` are lists of `name`, `available` and either `version` or `reason`; `gpus` a list of
    `name`, `compute_capability`, `memory_mib`, `driver`, with the reason in `gpus_missing` where it is empty.
    """
    gpus, reason = _gpus()
    return {
        "schema": 1,
        "deploy": _version("deploy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "gpus": gpus,
        "gpus_missing": reason,
        "torch": _torch(),
        "backends": [_backend(name) for name in BACKENDS],
        "flavours": [_flavour(name) for name in ("tensorrt", "tensorrt-rtx")],
        "optional": [_optional(name, extra) for name, extra in (("timm", "timm"), ("torchvision", "torchvision"))],
    }


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """GPUs as nvidia-smi lists them, and why there are none."""
    if shutil.which("nvidia-smi") is None:
        return [], "no NVIDIA driver here (nvidia-smi is not installed): engines can be built with tensorrt-rtx, not run"
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (subprocess.SubprocessError, OSError) as error:
        return [], f"nvidia-smi failed: {error}"
    gpus = []
    for line in output.splitlines():
        name, capability, memory, driver = [part.strip() for part in line.split(",")]
        gpus.append({"name": name, "compute_capability": capability, "memory_mib": int(memory), "driver": driver})
    return gpus, None if gpus else "nvidia-smi lists no GPU"


def _torch() -> dict[str, Any]:
    import torch  # slow to load, and a report without it would still be of use

    cuda = torch.version.cuda
    return {"version": torch.__version__, "cuda": cuda, "cuda_available": torch.cuda.is_available()}


def _backend(name: str) -> dict[str, Any]:
    try:
        importlib.import_module(f"deploy.runtime.{name}")
    except BackendError as error:
        return {"name": name, "available": False, "reason": str(error)}
    library = {"eager": "torch", "compile": "torch", "null": "deploy"}.get(name, name)
    return {"name": name, "available": True, "version": _version(library)}


def _flavour(name: str) -> dict[str, Any]:
    from deploy.engine.flavour import load_flavour

    try:
        return {"name": name, "available": True, "version": load_flavour(name).version}
    except DeployError as error:
        return {"name": name, "available": False, "reason": str(error)}


def _optional(name: str, install: str) -> dict[str, Any]:
    version = _version(name)
    if version is None:
        return {"name": name, "available": False, "reason": f"pip install {install}"}
    return {"name": name, "available": True, "version": version}


def _version(distribution: str) -> str | None:
    for candidate in (distribution, f"{distribution}-gpu"):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None
