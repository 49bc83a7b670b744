"""Artifacts from the disk: what a user may name as one, a directory or a bare `.onnx` file, and all that a folder holds."""

import logging
import os
from pathlib import Path

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import MANIFEST
from deploy.errors import ArtifactError, UsageError
from deploy.host.extras import missing

BUILD = Path("build")
"""Where artifacts go, and are looked for, when no directory is named."""


def open_artifact(path: Path | str) -> Artifact:
    """The artifact at `path`: a directory, or a bare `.onnx` file, for which onnx must be installed.

    Raises ArtifactError, UsageError if `path` is no path, BackendError if onnx is missing.
    """
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"expected an artifact, or the path of one or of an .onnx file, not {path!r}")
    path = Path(path)
    if path.suffix == ".onnx" and not path.is_dir():
        try:
            from deploy.artifact.onnxfile import open_onnx  # loads onnx, which a service that embeds the runtime does not need
        except ImportError as error:
            if known := missing(error, f"the bare ONNX file {path}"):
                raise known from error
            raise
        return open_onnx(path)
    return Artifact.open(path)


def artifacts_under(build: Path) -> list[Artifact]:
    """All artifacts at any depth under `build`, in the order in which they were made.

    One that cannot be opened is left out with a warning.
    """
    found = []
    for manifest in sorted(build.rglob(MANIFEST)):
        if any(part.startswith(".") for part in manifest.relative_to(build).parts):
            continue  # an artifact that is being written
        try:
            found.append(Artifact.open(manifest.parent))
        except ArtifactError as error:
            logging.getLogger(__name__).warning("left out: %s", error)
    # The time in the manifest is in whole seconds.
    return sorted(found, key=lambda artifact: (artifact.manifest.created, (artifact.path / MANIFEST).stat().st_mtime_ns))
