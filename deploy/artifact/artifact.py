"""An artifact on disk, a directory with a manifest: opening it, verifying it, and following it to its parents."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deploy.artifact.manifest import (
    CPU_ONNX,
    ENGINE,
    FORMAT,
    MANIFEST,
    ONNX,
    PACKAGE,
    WEIGHTS,
    Manifest,
    Parent,
    Stage,
    content_digest,
    file_digest,
)
from deploy.artifact.preprocess import Preprocess
from deploy.errors import ArtifactError, UsageError
from deploy.words import is_utf8


@dataclass(frozen=True)
class Artifact:
    """A directory and its manifest. `payload` is the file that is run.

    For a bare ONNX file the manifest is made in memory, `path` is the folder of the file and `bare` its name.
    """

    path: Path
    manifest: Manifest
    bare: str | None = None

    @classmethod
    def open(cls, path: Path | str) -> "Artifact":
        """Read the manifest of the artifact at `path`. Raises ArtifactError. Does not check the payload: see `verify`."""
        path = Path(path)
        if not path.exists():
            raise ArtifactError(f"no artifact at {path}")
        if not is_utf8(path):
            raise ArtifactError(f"the path {path} is not UTF-8, and what runs it cannot open it: rename it")
        if not path.is_dir():
            raise ArtifactError(f"{path} is not an artifact: expected a directory with {MANIFEST}, or an .onnx file")
        try:
            text = (path / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise ArtifactError(f"{path} is not an artifact: it has no {MANIFEST}") from None
        except OSError as error:
            raise ArtifactError(f"{path / MANIFEST} cannot be read: {error.strerror}") from error
        try:
            head = json.loads(text)
            if isinstance(head, dict) and head.get("format", FORMAT) != FORMAT:
                raise ArtifactError(
                    f"{path / MANIFEST} has format {head['format']!r}; this version reads {FORMAT}: export it again"
                )
            manifest = msgspec.convert(head, Manifest)
        except (ValueError, UsageError) as error:  # msgspec's errors, JSON's and Unicode's are ValueErrors
            raise ArtifactError(f"{path / MANIFEST} cannot be read: {error}; make the artifact again") from error
        if content_digest(head) != manifest.digest:  # of the text: it may lack fields that this version knows
            raise ArtifactError(f"{path / MANIFEST} was edited: its content does not fit its digest; make the artifact again")
        return cls(path, manifest)

    @property
    def onnx_path(self) -> Path:
        """The ONNX graph: the payload itself, or the typed graph that an engine was built from."""
        return self.path / (self.bare or ONNX)

    @property
    def cpu_path(self) -> Path | None:
        """The form of the graph for ONNX Runtime on processors with VNNI; None where there is none."""
        return self.path / CPU_ONNX if CPU_ONNX in self.manifest.files and self.bare is None else None

    @property
    def payload(self) -> Path:
        compiled = {"engine": ENGINE, "package": PACKAGE}.get(self.manifest.kind)
        return self.path / compiled if compiled else self.onnx_path

    @property
    def preprocess(self) -> Preprocess | None:
        """How an image becomes the input, ready to use: `artifact.preprocess.open("cat.jpg")`.

        Where that is a function of the user's, its first use runs the user's code.
        """
        return self.manifest.preprocess and self.manifest.preprocess.within(self.path)

    @property
    def location(self) -> Path:
        """The path that a user would type."""
        return self.path / self.bare if self.bare else self.path

    @property
    def shown(self) -> str:
        """The location in messages: relative if it is under the current folder."""
        try:
            return str(Path(os.path.abspath(self.location)).relative_to(Path.cwd()))
        except ValueError:
            return str(self.location)

    @property
    def size(self) -> int:
        """The size in bytes of the engine or package, or of the ONNX file with its external data; without the weights for rebuilding and
        the CPU form."""
        others = {WEIGHTS, *(function.file for function in self.manifest.functions)}
        others |= {name for name in self.manifest.files if name.startswith(CPU_ONNX) and self.bare is None}
        compiled = self.manifest.kind != "onnx"
        names = [self.payload.name] if compiled else [name for name in self.manifest.files if name not in others]
        return sum(self.manifest.files[name].bytes for name in names)

    def verify(self, *, weights: bool = True) -> None:
        """Compare every file of the payload with its size and hash. Raises ArtifactError naming the file.

        With `weights=False` the state_dict is not read: it is needed only to rebuild the eager module.
        """
        for name, record in self.manifest.files.items():
            if name == WEIGHTS and not weights:
                continue
            path = self.path / name
            if not path.is_file():
                raise ArtifactError(f"{path} is missing: the manifest lists it")
            size = path.stat().st_size
            if size != record.bytes:
                raise ArtifactError(f"{path} has {size} bytes; the manifest says {record.bytes}: the file is damaged")
            if file_digest(path) != record.sha256:
                raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one in the manifest; make the artifact again")

    def parent(self) -> "Artifact | None":
        """The artifact from which this one was made. Raises ArtifactError if it is gone or was replaced.

        None for an export and for an artifact made of a bare ONNX file; for the latter the file must be unchanged.
        """
        record = self.manifest.parent
        if record is None:
            return None
        path = Path(os.path.realpath(self.path / record.path))
        if path.suffix == ".onnx" and not path.is_dir():
            if not path.is_file():
                raise ArtifactError(f"the parent of {self.location} cannot be used: no file at {path}")
            if file_digest(path) != self.manifest.source.state_dict:
                raise ArtifactError(f"the parent of {self.location} has changed: {path}; make {self.location} again")
            return None
        try:
            parent = Artifact.open(path)
        except ArtifactError as error:
            raise ArtifactError(f"the parent of {self.location} cannot be used: {error}") from error
        if parent.manifest.digest != record.digest:
            raise ArtifactError(
                f"the parent of {self.location} has changed: {path} has digest {parent.manifest.digest[:12]},"
                f" and {record.digest[:12]} was used; make {self.location} again"
            )
        return parent

    def root(self) -> "Artifact":
        """The first ancestor: the export, which has the weights. Raises ArtifactError."""
        artifact = self
        while (parent := artifact.parent()) is not None:
            artifact = parent
        return artifact


def standing(out: Path, stage: Stage) -> Artifact | None:
    """The artifact at `out` if the same stage made it from the same inputs and it is undamaged, else None."""
    if not (out / MANIFEST).is_file():
        return None
    try:
        artifact = Artifact.open(out)
        if artifact.manifest.stage != stage:
            return None
        artifact.verify()
        artifact.root()
    except ArtifactError:
        return None  # damaged or orphaned: it is made again
    return artifact


def parent_record(artifact: Artifact, out: Path) -> Parent:
    """The record that makes `artifact` the parent of an artifact at `out`, with a path relative to `out`."""
    path = os.path.relpath(os.path.realpath(artifact.location), os.path.realpath(out))
    return Parent(path=path, digest=artifact.manifest.digest)
