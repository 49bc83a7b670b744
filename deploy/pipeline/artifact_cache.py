"""Finished artifacts kept between runs, by all that they depend on: a second engine or quantized artifact is a copy."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from deploy.artifact.artifact import Artifact, parent_record
from deploy.artifact.manifest import DATA, WEIGHTS, Manifest, Stage, request_digest
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import ArtifactError, OutputError
from deploy.host.cache import ENGINES, cache_folder, trim

logger = logging.getLogger(__name__)


class ArtifactCache:
    """A folder of the cache with finished artifacts. Messages call one of them `what`."""

    def __init__(self, name: str, what: str) -> None:
        self._name = name
        self._what = what

    @property
    def folder(self) -> Path:
        return cache_folder() / self._name

    def fill(self, writer: ArtifactWriter, source: Artifact, request: Mapping[str, Any], stage: Stage) -> Manifest | None:
        """Write the artifact that was made from the same ONNX file as `source` with the same `request`; returns its manifest.

        None if there is none, or if another process removes it at this moment. A damaged one is removed: it can be made again.
        """
        kept = self.folder / _key(source, request)
        if not kept.is_dir():
            return None
        try:
            found = Artifact.open(kept)
            found.verify()
        except ArtifactError as error:
            logger.warning("a kept %s is damaged, and is made again: %s", self._what, error)
            shutil.rmtree(kept, ignore_errors=True)
            return None
        wanted = [name for name in found.manifest.files if not (writer.path / name).exists()]  # the user's files are there
        try:
            os.utime(kept)
            for name in wanted:
                _duplicate(found.path / name, writer.path / name)
        except FileNotFoundError:  # trimmed in the meantime
            for name in wanted:
                (writer.path / name).unlink(missing_ok=True)
            return None
        logger.info("the same %s was made before: copied from %s", self._what, self.folder)
        return _addressed(found.manifest, source, writer.out, stage)

    def put(self, source: Artifact, request: Mapping[str, Any], made: Artifact) -> None:
        """Keep `made`. If that fails, log a warning: the artifact itself is made."""
        kept = self.folder / _key(source, request)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with ArtifactWriter(kept) as writer:
                for name in made.manifest.files:
                    _duplicate(made.path / name, writer.path / name)
                writer.commit(made.manifest)
            trim(self.folder)
        except (OSError, OutputError) as error:
            logger.warning("the %s cannot be kept in %s: %s", self._what, self.folder, error)


ENGINE_CACHE = ArtifactCache(ENGINES, "engine")
QUANTIZED_CACHE = ArtifactCache("quantized", "quantized artifact")


def _duplicate(source: Path, target: Path) -> None:
    """A hard link where both are on one file system, else a copy. Nothing of ours writes to a file that is in place, and
    what others do to one is found by its hash. onnx does not read weights beside a graph if their file has a second name."""
    try:
        if source.name.endswith(DATA):
            shutil.copyfile(source, target)
        else:
            os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def _key(source: Artifact, request: Mapping[str, Any]) -> str:
    """The content of the ONNX file and what is said of it, but not where it lies or what it is called; and the request."""
    manifest = source.manifest
    content = {
        "files": sorted(record.sha256 for name, record in manifest.files.items() if name != WEIGHTS),
        "precision": manifest.precision,
        "inputs": msgspec.to_builtins(manifest.inputs),
        "outputs": msgspec.to_builtins(manifest.outputs),
        "preprocess": msgspec.to_builtins([manifest.image, manifest.preprocess, manifest.other_images]),
        "exclusions": msgspec.to_builtins(manifest.exclusions),
        "calibration": msgspec.to_builtins(manifest.calibration),
    }
    return request_digest({**request, "source": content})


def _addressed(kept: Manifest, source: Artifact, out: Path, stage: Stage) -> Manifest:
    """The manifest of a kept artifact as that of one made now from `source`, whose ONNX file is the same."""
    own = source.manifest
    parity, form = own.parity, own.cpu_form
    accuracy, accuracies = own.accuracy, own.accuracies
    if kept.parity is not None and kept.parent is not None and kept.parity.against == kept.parent.digest:  # it was converted
        parity, form = dataclasses.replace(kept.parity, against=own.digest), kept.cpu_form
        accuracy, accuracies = kept.accuracy, kept.accuracies
        if form is not None and form.parity is not None:
            form = msgspec.structs.replace(form, parity=dataclasses.replace(form.parity, against=own.digest))
    return msgspec.structs.replace(
        kept,
        name=out.resolve().name,
        parent=parent_record(source, out),
        source=own.source,
        classes=own.classes,
        parity=parity,
        accuracy=accuracy,
        accuracies=accuracies,
        cpu_form=form,
        stage=stage,
    )
