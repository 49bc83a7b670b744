"""`deploy.load`: an artifact, or a bare ONNX file, as a session."""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, cast

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.errors import BackendError
from deploy.host.extras import extra_of, missing
from deploy.runtime.catalog import BACKENDS, Backend, auto_order, own_backend, refuse_wrong, split_backend
from deploy.runtime.fastest import fastest_backend
from deploy.runtime.lifetime import bind
from deploy.runtime.session import Session, SessionOptions


class BackendModule(Protocol):
    """What every file in `deploy/runtime/backends` has."""

    def version(self, variant: Sequence[str]) -> str:
        """The version of the library. Raises BackendError, saying what to install, if `variant` needs more than there is."""

    def open_session(self, artifact: Artifact, options: SessionOptions) -> Session: ...


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

    backend: a name from `deploy.runtime.catalog.BACKENDS`, with a variant if you like (`onnxruntime:cuda`). `auto` is the
        flavour of an engine, `aoti` for a package, and for anything else the first backend of `auto_order` that can run the artifact. `fastest` times
        those once, in processes of their own at the optimal shape of the first profile, and remembers the choice by artifact
        and machine in `fastest_file()`.
    device, threads, compute, contexts, rebuild: see `SessionOptions`.

    Raises ArtifactError, BackendError or UsageError.
    """
    artifact = path if isinstance(path, Artifact) else open_artifact(path)
    options = SessionOptions(device=device, threads=threads, compute=compute, contexts=contexts, rebuild=rebuild)
    if backend == "fastest":
        backend = fastest_backend(artifact, options)
    return open_session(artifact, backend, options)


def open_session(artifact: Artifact, backend: str = "auto", options: SessionOptions | None = None) -> Session:
    """Open `artifact` with a backend of `BACKENDS`, with a variant after a colon if you like.

    `auto` is the flavour of an engine, `aoti` for a package, and for any other artifact the first of `auto_order` that can run it here. Raises UsageError
    for an unknown backend, BackendError if it is not installed, cannot run the artifact, or is known to compute something else
    than what the artifact was made from, ArtifactError if a file of the artifact is damaged.
    """
    options = options or SessionOptions()
    if backend == "auto":
        backend = own_backend(artifact) or "auto"
    if backend != "auto":
        chosen, variant = split_backend(backend)
        if not chosen.needs_gpu(variant):
            refuse_wrong(artifact, chosen.name)
        return _opened(chosen, artifact, dataclasses.replace(options, variant=variant))
    reasons = []
    for name in auto_order(artifact):
        try:
            refuse_wrong(artifact, name)
            return _opened(BACKENDS[name], artifact, options)
        except BackendError as error:
            reasons.append(f"{name}: {error}")
    raise BackendError(f"no backend can run {artifact.location} here: " + "; ".join(reasons))


def _opened(backend: Backend, artifact: Artifact, options: SessionOptions) -> Session:
    session = import_backend(backend).open_session(artifact, options)
    bind(session)
    return session


def import_backend(backend: Backend) -> BackendModule:
    """The module of a backend. Raises BackendError if its library is not installed, or cannot be imported."""
    try:
        return cast(BackendModule, importlib.import_module(f"deploy.runtime.backends.{backend.name.replace('-', '_')}"))
    except ImportError as error:
        if known := missing(error, f"the backend {backend.name}"):
            raise known from error
        if backend.library is None:
            raise
        raise BackendError(
            f"{backend.library} cannot be imported ({error}); install it with: pip install 'deploy[{extra_of(backend.library)}]'"
        ) from error
