"""The report of `deploy doctor`: what this machine can do, and which libraries are installed or missing.

It needs none of the libraries that it reports on.
"""

import importlib.util
import platform
from typing import Any

from deploy.artifact.manifest import FLAVOURS
from deploy.engine.compatibility import rtx_refusal
from deploy.engine.cuda.driver import has_gpu
from deploy.engine.flavour import load_flavour
from deploy.errors import DeployError
from deploy.host.compiler import NO_COMPILER, STATIC, cxx_compiler, is_static
from deploy.host.cpu import cpu_model, usable_cores
from deploy.host.extras import EXTRAS
from deploy.host.nvidia_smi import list_gpus
from deploy.host.versions import versions
from deploy.runtime.catalog import BACKENDS, split_backend
from deploy.runtime.load import import_backend
from deploy.version import __version__

_RTX = "tensorrt-rtx"

OPTIONAL = ("timm", "torchvision")
"""Distributions that no extra brings by itself, or that a user may want alone."""


def examine() -> dict[str, Any]:
    """The report, ready for JSON.

    `backends`, `flavours` and `optional` are lists of `name`, `available` and either `version` or `reason`; a flavour may have a
    `note` too. `extras` is a list
    of `name`, `available`, `install` (the pip command) and `libraries`, each with `name` and `version`, None if it is missing.
    `compiler` is the path of the C++ compiler that packages are built with, or None; `compiler_missing` is what to do then.
    `gpus` is a list of `name`, `compute_capability`, `memory_mib` and `driver`; `gpus_missing` is the reason if it is empty.
    `torch` has `version`, `cuda` and `cuda_available`, and a `reason` if it cannot be imported.
    """
    gpus, reason = list_gpus()
    no_gpu = None if gpus or has_gpu() else f"runs on an NVIDIA GPU: {reason}"
    no_rtx = _no_rtx(gpus)
    listed = [f"{name}:{variant}" if variant else name for name in BACKENDS for variant in ("", *BACKENDS[name].listed)]
    return {
        "schema": 1,
        "deploy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "gpus": gpus,
        "gpus_missing": reason,
        "torch": _torch(),
        "compiler": cxx_compiler(),
        "compiler_missing": _without_compiler(),
        "backends": [_backend(name, no_gpu or (no_rtx if name == _RTX else None)) for name in listed],
        "flavours": [_flavour(name, no_rtx if name == _RTX else None) for name in FLAVOURS],
        "optional": [_optional(name) for name in OPTIONAL],
        "extras": [_extra(name) for name in EXTRAS],
    }


def _without_compiler() -> str | None:
    compiler = cxx_compiler()
    if compiler is None:
        return f"`deploy build-aoti` {NO_COMPILER}"
    return f"`deploy build-aoti` cannot use it: {STATIC}" if is_static(compiler) else None


def _torch() -> dict[str, Any]:
    try:
        import torch  # slow to load, and the report is of use without it
    except (ImportError, OSError) as error:
        return {"version": None, "cuda": None, "cuda_available": False, "reason": f"{error}: {_install('export')}"}
    cuda = torch.version.cuda
    return {"version": torch.__version__, "cuda": cuda, "cuda_available": torch.cuda.is_available()}


def _backend(name: str, no_gpu: str | None) -> dict[str, Any]:
    """The entry of a backend, with a variant if any. no_gpu: why there is no GPU for it, None if there is one."""
    backend, variant = split_backend(name)
    try:
        version = import_backend(backend).version(variant)
    except DeployError as error:
        return {"name": name, "available": False, "reason": str(error)}
    if no_gpu is not None and backend.needs_gpu(variant):
        return {"name": name, "available": False, "reason": no_gpu}
    return {"name": name, "available": True, "version": version}


def _flavour(name: str, elsewhere: str | None) -> dict[str, Any]:
    """The entry of a flavour. elsewhere: why what it builds runs on other machines alone, if so."""
    try:
        found = {"name": name, "available": True, "version": load_flavour(name).version}
    except DeployError as error:
        return {"name": name, "available": False, "reason": str(error)}
    return found | ({"note": f"builds for other GPUs: {elsewhere}"} if elsewhere else {})


def _no_rtx(gpus: list[dict[str, Any]]) -> str | None:
    """Why tensorrt-rtx runs on none of the GPUs here; None if it runs on one, or there are none."""
    refusals = [rtx_refusal(gpu["name"], gpu["compute_capability"]) for gpu in gpus]
    return refusals[0] if refusals and all(refusals) else None


def _optional(name: str) -> dict[str, Any]:
    version = _installed(name, name)
    if version is None:
        return {"name": name, "available": False, "reason": f"pip install {name}"}
    return {"name": name, "available": True, "version": version}


def _extra(extra: str) -> dict[str, Any]:
    libraries = [{"name": name, "version": _installed(module, name)} for module, name in EXTRAS[extra].items()]
    available = all(library["version"] is not None for library in libraries)
    return {"name": extra, "available": available, "install": _install(extra), "libraries": libraries}


def _install(extra: str) -> str:
    return f"pip install 'deploy[{extra}]'"


def _installed(module: str, distribution: str) -> str | None:
    """The version of a distribution whose module can be found; None if it is missing."""
    return (
        versions((distribution,))[distribution]
        if all(map(importlib.util.find_spec, (module.partition(".")[0], module)))
        else None
    )
