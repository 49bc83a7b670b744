"""What is read of a manifest, and what is refused."""

import json

import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import MANIFEST
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
