"""The catalog of backends: what must be known of each before its library is imported. Everything else asks here.

A new backend is a file in `deploy/runtime/backends` and a line in `BACKENDS`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import CPU_ONNX, FLAVOURS, ONNX, Accuracy
from deploy.errors import BackendError, UsageError
from deploy.host.cpu import has_vnni


@dataclass(frozen=True)
class Backend:
    """A backend, as the catalog lists it; its file is `backends/<name>.py` (`_` for `-`).

    runs: what it runs: the ONNX file, an engine of the flavour with its name, an AOTInductor package, or the PyTorch module, rebuilt.
    library: the Python module that it needs, such as `onnxruntime`; None if it needs none.
    variants: what may follow its name after a colon, separated by commas (`onnxruntime:cuda,tf32`): at most one of each group.
    gpu_variants: the variants that run on a GPU only. An engine always does, a package where it was built for one.
    listed: the variants that need more than the library; `deploy doctor` lists them beside the backend.
    auto: whether `auto` tries it, in the order of the catalog. A backend that runs modules must not be: it runs the user's code.
    computes: False for a backend that returns zeros, which says nothing about accuracy or arithmetic speed.
    """

    name: str
    runs: Literal["onnx", "engine", "package", "module"]
    library: str | None = None
    variants: tuple[tuple[str, ...], ...] = ()
    gpu_variants: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    auto: bool = False
    computes: bool = True

    def needs_gpu(self, variant: Sequence[str]) -> bool:
        return self.runs == "engine" or not set(self.gpu_variants).isdisjoint(variant)


_EAGER = (("fp16", "bf16"), ("channels_last",), ("cuda_graph",), ("tf32",))
_COMPILE = (("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"), ("fp16", "bf16"), ("channels_last",))
_ONNXRUNTIME = ("cuda", "tensorrt")
_ENGINE = (("cuda_graph",), ("nvtx",))
_ENGINES = {"tensorrt": _ENGINE, "tensorrt-rtx": (*_ENGINE, ("eager_kernels", "general_kernels"))}
CPU_FORMS = "onnxruntime"
"""The backend that the CPU form of an INT8 graph is for."""

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("onnxruntime", "onnx", "onnxruntime", (_ONNXRUNTIME, ("tf32",)), _ONNXRUNTIME, listed=_ONNXRUNTIME, auto=True),
        Backend("openvino", "onnx", "openvino", auto=True),
        *(Backend(flavour, "engine", flavour.replace("-", "_"), _ENGINES[flavour]) for flavour in FLAVOURS),
        Backend("aoti", "package", "torch", (("cuda_graph",),), ("cuda_graph",)),
        Backend("eager", "module", "torch", _EAGER, ("cuda_graph",)),
        Backend("compile", "module", "torch", _COMPILE),
        Backend("null", "onnx", computes=False),
    )
}
"""Every backend by name, in the order in which they are listed and benchmarked."""

AUTO = tuple(backend.name for backend in BACKENDS.values() if backend.auto)
"""The names that `auto` tries, in this order unless `auto_order` has another."""

LIBRARIES = (
    "deploy",
    *dict.fromkeys(backend.library.replace("_", "-") for backend in BACKENDS.values() if backend.library is not None),
)
"""The distributions whose versions say what a measurement was made with."""


def split_backend(backend: str) -> tuple[Backend, tuple[str, ...]]:
    """The backend and the variants that a name such as `eager:fp16,channels_last` consists of.

    Raises UsageError for an unknown backend or variant, and for variants that exclude one another.
    """
    name, colon, variant = backend.partition(":")
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; expected auto or one of {', '.join(BACKENDS)}")
    parts = tuple(variant.split(",")) if colon else ()
    check_variant(BACKENDS[name], parts)
    return BACKENDS[name], parts


def check_variant(backend: Backend, variant: Sequence[str]) -> None:
    """Raise UsageError unless `backend` has all of these variants, and they may be combined."""
    known = [name for group in backend.variants for name in group]
    for name in variant:
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else f"{backend.name} alone"
            raise UsageError(f"{backend.name} has no variant {name!r}; expected {expected}")
    for group in backend.variants:
        if len(chosen := [name for name in variant if name in group]) > 1:
            raise UsageError(f"{backend.name}:{','.join(variant)}: {' and '.join(chosen)} exclude one another; name one of them")


def auto_order(artifact: Artifact) -> tuple[str, ...]:
    """The backends that `auto` tries for an ONNX artifact, the one that is fast on it first.

    INT8: OpenVINO, which computes the Q/DQ graph on codes; ONNX Runtime before it where it runs the CPU form, and else
    behind it, because it is slower on a Q/DQ graph with signed activations than on the FP32 graph (docs/int8.md). Everything else:
    the order of the catalog.
    """
    if artifact.manifest.precision != "int8" or onnx_file(artifact, CPU_FORMS) != artifact.onnx_path:
        return AUTO
    return tuple(sorted(AUTO, key=lambda name: name == CPU_FORMS))


def onnx_file(artifact: Artifact, backend: str, variant: Sequence[str] = ()) -> Path:
    """The ONNX file of `artifact` that a backend runs here: `artifact.cpu_path` on ONNX Runtime where the processor has VNNI."""
    form = artifact.cpu_path
    runs_form = form is not None and backend == CPU_FORMS and not BACKENDS[backend].needs_gpu(variant) and has_vnni()
    return form if form is not None and runs_form else artifact.onnx_path


def size_run(artifact: Artifact, backend: str) -> int:
    """The bytes of the file that a backend, variants and all, runs here, with its external data."""
    name, _, variant = backend.partition(":")
    if own_backend(artifact) is not None or onnx_file(artifact, name, variant.split(",")) != artifact.cpu_path:
        return artifact.size
    return sum(record.bytes for file, record in artifact.manifest.files.items() if file.startswith(CPU_ONNX))


def recorded_accuracy(artifact: Artifact, backend: str) -> Accuracy | None:
    """The accuracy in the manifest that was measured on a backend, variants and all, with the file that it runs here; else the worst."""
    name, _, variant = backend.partition(":")
    file = onnx_file(artifact, name, variant.split(",")).name
    ran = (each for each in artifact.manifest.accuracies if each.backend == backend and (each.file or ONNX) == file)
    return next(ran, artifact.manifest.accuracy)


def own_backend(artifact: Artifact) -> str | None:
    """The one backend that runs an engine or a package; None for an ONNX artifact, which several run."""
    manifest = artifact.manifest
    if manifest.kind == "package":
        return "aoti"
    return manifest.target.flavour if manifest.target is not None else None


def refuse_compiled(artifact: Artifact) -> None:
    """Raise BackendError if `artifact` is an engine or a package, which its own backend alone runs."""
    manifest = artifact.manifest
    if manifest.kind == "onnx":
        return
    backend = own_backend(artifact) or FLAVOURS[0]
    parent = f" ({os.path.normpath(artifact.path / manifest.parent.path)})" if manifest.parent else ""
    if manifest.kind == "engine":
        what = f"a {backend} engine: it runs on an NVIDIA GPU with the backend {backend}"
    else:
        what = f"an AOTInductor package: it runs with the backend {backend}"
    raise BackendError(f"{artifact.location} is {what}; run the ONNX artifact that it was built from{parent} on others")


def refuse_wrong(artifact: Artifact, backend: str) -> None:
    """Raise BackendError if the file of `artifact` was found to be wrong on `backend` when it was made."""
    parity = artifact.manifest.parity
    if onnx_file(artifact, backend) != artifact.onnx_path:
        return  # that file is there only where it is right
    if parity is not None and artifact.manifest.kind == "onnx" and (wrong := parity.wrong_on(backend)):
        raise BackendError(f"{artifact.location} must not run on {backend}: compared with what it was made from, {wrong}")
