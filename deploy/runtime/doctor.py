"""What this machine can do: processor, GPUs, driver, and each library with its version or what is missing."""

import platform
from importlib import metadata
from typing import Any

from deploy.engine.cuda.driver import has_gpu
from deploy.engine.flavour import load_flavour
from deploy.errors import DeployError
from deploy.host.cpu import cpu_model, usable_cores
from deploy.host.nvidia_smi import list_gpus
from deploy.runtime.catalog import BACKENDS, ENGINES, split_backend
from deploy.runtime.load import import_backend

LISTED = ("onnxruntime", "onnxruntime:cuda", "onnxruntime:tensorrt", *BACKENDS[1:])
"""Backends, and the variants that need more than the backend does."""

_QUERY = ("name", "compute_cap", "memory.total", "driver_version")


def examine() -> dict[str, Any]:
    """A JSON-like report.

    `backends` and `flavours` are lists of `name`, `available` and either `version` or `reason`; `gpus` a list of
    `name`, `compute_capability`, `memory_mib`, `driver`, with the reason in `gpus_missing` where it is empty.
    """
    gpus, reason = list_gpus()
    no_gpu = None if gpus or has_gpu() else f"runs on an NVIDIA GPU: {reason}"
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
        "backends": [_backend(name, no_gpu) for name in LISTED],
        "flavours": [_flavour(name) for name in ("tensorrt", "tensorrt-rtx")],
        "optional": [_optional(name, extra) for name, extra in (("timm", "timm"), ("torchvision", "torchvision"))],
    }


def _torch() -> dict[str, Any]:
    import torch  # slow to load, and a report without it would still be of use

    cuda = torch.version.cuda
    return {"version": torch.__version__, "cuda": cuda, "cuda_available": torch.cuda.is_available()}


def _backend(backend: str, no_gpu: str | None) -> dict[str, Any]:
    """`no_gpu`: why there is no GPU, None where there is one."""
    name, variant = split_backend(backend)
    try:
        if name in ENGINES:
            version: str | None = load_flavour(name).version
        else:
            version = _version({"eager": "torch", "compile": "torch", "null": "deploy"}.get(name, name))
        module = import_backend(name)
        missing = module.provider_missing(variant[0]) if variant else None
    except DeployError as error:
        missing = str(error)
    if missing is None and (variant or name in ENGINES):
        missing = no_gpu
    if missing is not None:
        return {"name": backend, "available": False, "reason": missing}
    return {"name": backend, "available": True, "version": version}


def _flavour(name: str) -> dict[str, Any]:
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
