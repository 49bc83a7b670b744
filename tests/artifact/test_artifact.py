"""Artifacts say so when they are damaged, and know their parents."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact, standing
from deploy.artifact.manifest import MANIFEST, ONNX, WEIGHTS, Parent, Stage
from deploy.artifact.summary import summary
from deploy.artifact.tensors import random_feed
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import ArtifactError
from deploy.serving.metrics import Meter
from deploy.serving.models import ModelOptions, open_served
from deploy.serving.source import ModelSource

Write = Callable[..., Artifact]


def test_what_is_written_is_what_is_read(made: Artifact) -> None:
    opened = Artifact.open(made.path)
    opened.verify()
    assert opened == made
    assert set(opened.manifest.files) == {ONNX}
    assert [path.name for path in made.path.parent.iterdir()] == ["made"]


def test_a_flipped_byte_in_the_payload_is_found(made: Artifact) -> None:
    content = bytearray(made.onnx_path.read_bytes())
    content[len(content) // 2] ^= 1
    made.onnx_path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=r"model\.onnx is damaged"):
        Artifact.open(made.path).verify()


def test_a_truncated_payload_is_found_by_its_size(made: Artifact) -> None:
    made.onnx_path.write_bytes(made.onnx_path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes; the manifest says"):
        Artifact.open(made.path).verify()


def test_a_missing_payload_is_found(made: Artifact) -> None:
    made.onnx_path.unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        Artifact.open(made.path).verify()


def test_what_is_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact at"):
        Artifact.open(tmp_path / "missing")
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        Artifact.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="expected a directory"):
        Artifact.open(tmp_path / "file")


def child_of(parent: Artifact, out: Path, onnx_file: Path) -> Artifact:
    with ArtifactWriter(out) as writer:
        shutil.copyfile(onnx_file, writer.path / ONNX)
        record = Parent(path=os.path.relpath(parent.path, out), digest=parent.manifest.digest)
        return writer.commit(msgspec.structs.replace(parent.manifest, name="child", files={}, parent=record))


def test_a_parent_is_found_after_both_moved_together(made: Artifact, tiny_onnx: Path, tmp_path: Path) -> None:
    child = child_of(made, tmp_path / "child", tiny_onnx)
    assert child.parent() == made
    assert child.root() == made
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    made.path.rename(moved / "made")
    child.path.rename(moved / "child")
    assert Artifact.open(moved / "child").root().path == moved / "made"


def test_a_parent_that_is_gone_or_replaced_is_an_error_that_says_what_is_missing(
    made: Artifact, write: Write, tiny_onnx: Path, tmp_path: Path
) -> None:
    child = child_of(made, tmp_path / "child", tiny_onnx)
    replaced = write(made.path, "other")
    with pytest.raises(
        ArtifactError, match=f"has digest {replaced.manifest.digest[:12]}, and {made.manifest.digest[:12]} was used"
    ):
        child.parent()
    shutil.rmtree(made.path)
    with pytest.raises(ArtifactError, match=r"parent of .*child cannot be used: no artifact at .*made"):
        child.root()


def test_an_artifact_stands_only_for_the_same_request_and_undamaged(made: Artifact) -> None:
    assert standing(made.path, made.manifest.stage) == made
    assert standing(made.path, Stage(name="onnx", request="another")) is None
    made.onnx_path.write_bytes(b"")
    assert standing(made.path, made.manifest.stage) is None


@pytest.mark.parametrize("harm", ["damaged", "truncated", "deleted"])
def test_weights_are_checked_only_where_they_are_read(
    lenet5: Artifact, run: Callable[..., Any], tmp_path: Path, harm: str
) -> None:
    weights = lenet5.path / WEIGHTS
    content = weights.read_bytes()
    harmed = {"damaged": content[:-1] + bytes([content[-1] ^ 1]), "truncated": content[:-1]}
    weights.unlink()
    if harm in harmed:
        weights.write_bytes(harmed[harm])
    Image.new("L", (28, 28), 9).save(tmp_path / "nine.png")
    with deploy.load(lenet5.path) as session:
        session.run(random_feed(session.inputs, {"batch": 1}))
    assert len(deploy.predict(lenet5.path, tmp_path / "nine.png")) == 1
    served = open_served(ModelSource(name="lenet5", path=lenet5.path), ModelOptions(), Meter("lenet5", "1"))
    served.batcher.close()
    served.session.close()
    inspected = run("inspect", lenet5.path)
    assert inspected.status == 1
    assert f"{WEIGHTS} {'is missing' if harm == 'deleted' else 'has' if harm == 'truncated' else 'is damaged'}" in inspected.err
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is (damaged|missing)"):
        deploy.load(lenet5.path, "eager")


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "manifests").glob("*.json")), ids=lambda path: path.stem)
def test_manifests_of_earlier_versions_stay_readable(path: Path, tmp_path: Path) -> None:
    """Written before parity had a figure for each backend."""
    text = path.read_text(encoding="utf-8")
    assert "backends" not in text
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    artifact = Artifact.open(tmp_path)
    assert artifact.manifest.parity is not None
    assert artifact.manifest.parity.backends == []
    assert artifact.manifest.parity.wrong_on("onnxruntime") is None
    assert artifact.manifest.name in summary(artifact) or artifact.shown in summary(artifact)
    (tmp_path / MANIFEST).write_text(json.dumps({**json.loads(text), "name": "another"}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="was edited"):
        Artifact.open(tmp_path)
