"""The skeleton that every stage runs through."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX, Manifest, Parent, Stage
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import ArtifactError, OutputError, ParityError
from deploy.pipeline.stage import descendant, fp32_source, run_stage


class Copy:
    """A stage that copies the graph; `request` is what it depends on."""

    name = "copy"

    def __init__(self, source: Artifact, request: Mapping[str, Any] | None, fails: bool = False) -> None:
        self.source = source
        self.asked = request
        self.fails = fails
        self.made = 0

    def request(self) -> Mapping[str, Any] | None:
        return self.asked

    def make(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        self.made += 1
        shutil.copy(self.source.onnx_path, writer.path / ONNX)
        if self.fails:
            raise ParityError("too far off")
        return descendant(self.source, writer.out, stage)


def test_what_is_up_to_date_is_not_made_again(shared_lenet5: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = run_stage(Copy(shared_lenet5, {"option": 1}), tmp_path / "copy", shared_lenet5)
    assert first.root() == shared_lenet5
    assert first.manifest.stage.name == "copy"
    again = Copy(shared_lenet5, {"option": 1})
    with caplog.at_level("INFO", "deploy"):
        assert run_stage(again, tmp_path / "copy", shared_lenet5) == first
    assert again.made == 0
    assert f"{tmp_path / 'copy'} is up to date" in caplog.text
    other = Copy(shared_lenet5, {"option": 2})
    run_stage(other, tmp_path / "copy", shared_lenet5)
    assert other.made == 1


def test_what_depends_on_something_that_cannot_be_known_is_always_made(shared_lenet5: Artifact, tmp_path: Path) -> None:
    digests = set()
    for _ in range(2):
        work = Copy(shared_lenet5, None)
        digests.add(run_stage(work, tmp_path / "copy", shared_lenet5).manifest.stage.request)
        assert work.made == 1
    assert len(digests) == 2


def test_a_stage_that_fails_leaves_what_there_was(shared_lenet5: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ParityError):
        run_stage(Copy(shared_lenet5, {}, fails=True), tmp_path / "new" / "deep" / "copy", shared_lenet5)
    assert list(tmp_path.iterdir()) == []
    first = run_stage(Copy(shared_lenet5, {}), tmp_path / "copy", shared_lenet5)
    with pytest.raises(ParityError):
        run_stage(Copy(shared_lenet5, {"other": 1}, fails=True), tmp_path / "copy", shared_lenet5)
    assert Artifact.open(tmp_path / "copy") == first


def test_an_output_that_cannot_be_is_refused_before_any_work(lenet5: Artifact) -> None:
    work = Copy(lenet5, {})
    with pytest.raises(OutputError, match="which the output is made from"):
        run_stage(work, lenet5.path, lenet5)
    assert work.made == 0


@pytest.fixture
def half(lenet5: Artifact, tmp_path: Path) -> Artifact:
    return deploy.convert(lenet5, tmp_path / "half", precision="fp16")


def test_the_fp32_artifact_is_the_artifact_itself_or_its_parent(lenet5: Artifact, half: Artifact) -> None:
    assert fp32_source(lenet5, "why") is lenet5
    assert fp32_source(half, "why") == lenet5


def test_an_fp32_artifact_that_is_gone_or_never_was_is_said_with_the_reason(
    lenet5: Artifact, half: Artifact, tmp_path: Path
) -> None:
    orphan = Artifact(half.path, msgspec.structs.replace(half.manifest, parent=None))
    with pytest.raises(ArtifactError, match="half has no FP32 artifact that it was made from, and accuracy is compared with it"):
        fp32_source(orphan, "accuracy is compared with it")
    second = Artifact(half.path, msgspec.structs.replace(half.manifest, parent=Parent(path=".", digest=half.manifest.digest)))
    with pytest.raises(ArtifactError, match="has no FP32 artifact"):
        fp32_source(second, "why")
    shutil.rmtree(lenet5.path)
    with pytest.raises(ArtifactError, match=r"no artifact at .*lenet5\nit is needed because accuracy is compared with it"):
        fp32_source(half, "accuracy is compared with it")
