"""The backends: their names, variants and order."""

import os
from collections.abc import Sequence

from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError, UsageError

BACKENDS = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "eager", "compile", "null")
"""Every backend, in the order in which they are listed and benchmarked. `onnxruntime:cuda` is one with a variant."""
ENGINES = ("tensorrt", "tensorrt-rtx")
"""Backends that run engines, each those of its own flavour; the others run ONNX files or the module."""
VARIANTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "onnxruntime": (("cuda", "tensorrt"), ("tf32",)),
    "tensorrt": (("cuda_graph",),),
    "tensorrt-rtx": (("cuda_graph",),),
    "eager": (("fp16", "bf16"), ("channels_last",), ("cuda_graph",), ("tf32",)),
    "compile": (
        ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        ("fp16", "bf16"),
        ("channels_last",),
    ),
}
"""What may follow the name of a backend behind a colon, with commas between: at most one of each group."""
AUTO = ("onnxruntime", "openvino")
"""What `auto` tries, in this order. Never eager or compile: they run the model factory's code."""


def split_backend(backend: str) -> tuple[str, tuple[str, ...]]:
    """`"eager:fp16,channels_last"` -> `("eager", ("fp16", "channels_last"))`.

    Raises UsageError for an unknown backend or variant, and for variants that exclude one another.
    """
    name, colon, variant = backend.partition(":")
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; expected auto or one of {', '.join(BACKENDS)}")
    parts = tuple(variant.split(",")) if colon else ()
    check_variant(name, parts)
    return name, parts


def check_variant(backend: str, variant: Sequence[str]) -> None:
    groups = VARIANTS.get(backend, ())
    for name in variant:
        if not any(name in group for group in groups):
            expected = f"one of {', '.join(name for group in groups for name in group)}" if groups else f"{backend} alone"
            raise UsageError(f"{backend} has no variant {name!r}; expected {expected}")
    for group in groups:
        if len(found := [name for name in variant if name in group]) > 1:
            raise UsageError(f"{backend}:{','.join(variant)}: {' and '.join(found)} exclude one another; name one of them")


def refuse_engine(artifact: Artifact) -> None:
    """Raise BackendError when `artifact` is an engine."""
    manifest = artifact.manifest
    if manifest.kind == "engine":
        flavour = manifest.target.flavour if manifest.target else "tensorrt"
        parent = f" ({os.path.normpath(artifact.path / manifest.parent.path)})" if manifest.parent else ""
        raise BackendError(
            f"{artifact.location} is a {flavour} engine: it runs on an NVIDIA GPU with the backend {flavour}; run the ONNX"
            f" artifact that it was built from{parent} on others"
        )
