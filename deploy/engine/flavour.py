"""The flavours of TensorRT, `tensorrt` (10.x, 11.x) and `tensorrt-rtx`, behind one interface; a process may use both."""

import importlib
from dataclasses import dataclass
from typing import cast

from deploy.artifact.manifest import FLAVOURS, FlavourName
from deploy.engine.bindings import Bindings
from deploy.engine.cuda.driver import has_gpu
from deploy.errors import BackendError, UsageError
from deploy.host.extras import extra_of

RTX_TARGETS = ("8.0", "8.6", "8.9", "12.0")
"""The compute capabilities that TensorRT-RTX builds for by default."""


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """An installed flavour. trt: its Python module. version: of the library."""

    name: FlavourName
    version: str
    trt: Bindings

    @property
    def builds_without_gpu(self) -> bool:
        return self.name == "tensorrt-rtx"


def load_flavour(name: str = "auto") -> Flavour:
    """Load a flavour by name. `auto` is `tensorrt` if it is installed and there is a GPU, else `tensorrt-rtx`.

    Raises UsageError for an unknown name, BackendError if the flavour is not installed, or needs a GPU and there is none.
    """
    if name == "auto":
        if has_gpu() and _importable("tensorrt"):
            name = "tensorrt"
        else:
            name = "tensorrt-rtx"
    if name not in FLAVOURS:
        raise UsageError(f"unknown flavour {name!r}; expected auto, {' or '.join(FLAVOURS)}")
    try:
        trt = _import(name)
    except (ImportError, OSError) as error:
        raise BackendError(f"{name} is not installed: pip install 'deploy[{extra_of(_module(name))}]' ({error})") from error
    flavour = Flavour(name=name, version=_version(trt), trt=trt)
    if not flavour.builds_without_gpu and not has_gpu():
        raise BackendError(
            f"{name} {flavour.version} builds on an NVIDIA GPU, and there is none here; use the `flavour` tensorrt-rtx"
        )
    return flavour


def _version(trt: Bindings) -> str:
    return str(getattr(trt, "__version__"))  # noqa: B009  (missing in the stubs)


def _import(name: str) -> Bindings:
    module = importlib.import_module(_module(name))
    if not hasattr(module, "Builder"):
        raise ImportError(f"the module {_module(name)} is there without the library, as of stubs or of an old installation")
    return cast(Bindings, module)


def _module(name: str) -> str:
    """The Python module of a flavour."""
    return name.replace("-", "_")


def _importable(name: str) -> bool:
    try:
        _import(name)
    except (ImportError, OSError):
        return False
    return True
