"""`deploy.load`: an artifact, or a bare ONNX file, as a session."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Literal

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.errors import BackendError
from deploy.runtime.catalog import AUTO, split_backend
from deploy.runtime.fastest import fastest_backend
from deploy.runtime.session import Session, SessionOptions


def load(
    path: Artifact | Path | str,
    backend: str = "auto",
    device: str = "auto",
    *,
    threads: int | None = None,
    compute: Literal["fp32", "bf16", "fp16"] = "fp32",
    contexts: int | None = None,
    rebuild: bool = False,
) -> Session:
    """Open an artifact or an `.onnx` file.

    backend: a name from `deploy.runtime.catalog.BACKENDS`, with a variant of `VARIANTS` if any (`onnxruntime:cuda`); `auto`,
        the flavour of an engine, else the first of onnxruntime and openvino that can run the artifact; or `fastest`, which
        times these two once, in processes of their own at the optimal shape of the first profile, and remembers the choice
        by artifact and machine in `fastest_file()`.
    device, threads, compute, contexts, rebuild: see `SessionOptions`.

    Raises ArtifactError, BackendError or UsageError.
    """
    artifact = path if isinstance(path, Artifact) else open_artifact(path)
    options = SessionOptions(device=device, threads=threads, compute=compute, contexts=contexts, rebuild=rebuild)
    if backend == "fastest":
        backend = fastest_backend(artifact, options)
    return open_session(artifact, backend, options)


def open_session(artifact: Artifact, backend: str = "auto", options: SessionOptions | None = None) -> Session:
    """Open `artifact` with a backend of `BACKENDS`, and a variant behind a colon; `auto` is the flavour of an engine, and
    for any other artifact the first of `AUTO` that can run it here.

    Raises UsageError for an unknown backend, BackendError when it is not installed or cannot run the artifact, ArtifactError when a
    file of the artifact is damaged.
    """
    options = options or SessionOptions()
    if backend == "auto" and artifact.manifest.target is not None:
        backend = artifact.manifest.target.flavour
    if backend != "auto":
        name, variant = split_backend(backend)
        return import_backend(name).open_session(artifact, dataclasses.replace(options, variant=variant))  # type: ignore[no-any-return]
    reasons = []
    for name in AUTO:
        try:
            return import_backend(name).open_session(artifact, options)  # type: ignore[no-any-return]
        except BackendError as error:
            reasons.append(f"{name}: {error}")
    raise BackendError(f"no backend can run {artifact.location} here: " + "; ".join(reasons))


def import_backend(backend: str) -> Any:
    """The module of a backend, without a variant. Raises BackendError when its library is not installed."""
    return importlib.import_module(f"deploy.runtime.backends.{backend.replace('-', '_')}")
