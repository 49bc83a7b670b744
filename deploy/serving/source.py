"""The source of a model: its name, path and version, written NAME=PATH@VERSION."""

import re
from dataclasses import dataclass
from pathlib import Path

from deploy.artifact.find import open_artifact
from deploy.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """An artifact to serve or export, with the name and the version that clients use."""

    name: str
    path: Path
    version: str = "1"

    @classmethod
    def parse(cls, text: str) -> "ModelSource":
        """`resnet=build/resnet34-int8@2`; without NAME= the artifact's name is used, without @VERSION 1. Raises UsageError, ArtifactError."""
        name, equals, rest = text.partition("=")
        if not equals or "/" in name:
            name, rest = "", text
        path, at, version = rest.rpartition("@")
        if not at or not version.isdecimal():
            path, version = rest, "1"
        if not version.isdecimal() or int(version) < 1:
            raise UsageError(f"{text}: the version must be a number from 1, not {version!r}")
        if not name:
            name = open_artifact(path).manifest.name
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be the name of a model: use letters, digits, dots, dashes and underscores")
        return cls(name=name, path=Path(path), version=str(int(version)))
