"""What is read of a manifest, and what is refused."""

import json
import os
from pathlib import Path

import msgspec
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import MANIFEST, ONNX, SourceFile, request_digest
from deploy.artifact.onnxfile import open_onnx
from deploy.errors import ArtifactError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, "was edited"),
        ({"kind": "engin"}, r"kind"),
        ({"inputs": [{"name": "x", "dtype": "float99", "shape": [1]}]}, "float99"),
        ({"surprise": 1}, "surprise"),
        ({"format": 99}, "format 99"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused(made: Artifact, change: dict[str, object], message: str) -> None:
    manifest = json.loads((made.path / MANIFEST).read_text())
    (made.path / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(made.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x00\xff"])
def test_a_manifest_that_is_no_manifest_is_refused(made: Artifact, text: str) -> None:
    (made.path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Artifact.open(made.path)


def test_paths_that_are_not_utf8_come_back_as_they_were(made: Artifact, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xff \\udce9.pth")
    source = msgspec.structs.replace(made.manifest.source, weights=name, files=[SourceFile(path=name, sha256="0")])
    sealed = msgspec.structs.replace(made.manifest, source=source).sealed()
    (made.path / MANIFEST).write_bytes(sealed.to_json().encode())
    assert Artifact.open(made.path).manifest == sealed
    assert request_digest({"a": name}) != request_digest({"a": name + "\udce9"})


def test_artifact_under_a_path_that_is_not_utf8_is_refused_by_name(made: Artifact, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        made.path.rename(path)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    with pytest.raises(ArtifactError, match=r"is not UTF-8.*: rename it"):
        Artifact.open(path)
    with pytest.raises(ArtifactError, match=r"is not UTF-8.*: rename it"):
        open_onnx((path / ONNX).rename(tmp_path / os.fsdecode(b"\xe9.onnx")))
