"""Engine artifacts kept between builds, by the digest of all that they depend on: the second build is a copy."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from deploy.artifact import Artifact, Manifest
from deploy.cache import cache_folder
from deploy.errors import ArtifactError, OutputError
from deploy.opening import open_artifact
from deploy.writer import ArtifactWriter

logger = logging.getLogger(__name__)

LIMIT_BYTES = 4 << 30
"""All that is kept together; what was not used for longest goes first."""


def folder() -> Path:
    return cache_folder() / "engines"


def copy(key: str, out: Path, manifest: Callable[[Manifest], Manifest]) -> Artifact | None:
    """The artifact that was kept for `key`, copied to `out` with what `manifest` makes of its manifest; None without one.

    One that is damaged is removed: it can be built again. Raises OutputError.
    """
    kept = folder() / key
    if not kept.is_dir():
        return None
    try:
        found = open_artifact(kept)
        found.verify()
    except ArtifactError as error:
        logger.warning("a kept engine is damaged, and is built again: %s", error)
        shutil.rmtree(kept, ignore_errors=True)
        return None
    os.utime(kept)
    with ArtifactWriter(out) as writer:
        for name in found.manifest.files:
            shutil.copyfile(found.path / name, writer.path / name)
        return writer.commit(manifest(found.manifest))


def put(key: str, made: Artifact) -> None:
    """Keep `made`. Where that cannot be done a warning says so: the build itself is done."""
    kept = folder() / key
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with ArtifactWriter(kept) as writer:
            for name in made.manifest.files:
                shutil.copyfile(made.path / name, writer.path / name)
            writer.commit(made.manifest)
        _trim()
    except (OSError, OutputError) as error:
        logger.warning("the engine cannot be kept in %s: %s", folder(), error)


def _trim() -> None:
    entries = sorted((entry for entry in folder().iterdir() if entry.is_dir()), key=lambda entry: entry.stat().st_mtime)
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
    while sum(sizes.values()) > LIMIT_BYTES and len(sizes) > 1:
        oldest = next(iter(sizes))
        del sizes[oldest]
        shutil.rmtree(oldest, ignore_errors=True)
