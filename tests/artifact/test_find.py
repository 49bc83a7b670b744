import logging
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import artifacts_under, open_artifact
from deploy.artifact.manifest import MANIFEST
from deploy.errors import ArtifactError, UsageError


def place(artifact: Artifact, path: Path, created: str, mtime: int) -> Path:
    """A copy of `artifact` that says it was made at `created`, in a manifest written at `mtime`."""
    shutil.copytree(artifact.path, path)
    manifest = msgspec.structs.replace(artifact.manifest, created=created).sealed()
    (path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    os.utime(path / MANIFEST, (mtime, mtime))
    return path


def test_artifacts_come_in_the_order_in_which_they_were_made_at_any_depth(shared_lenet5: Artifact, tmp_path: Path) -> None:
    second = place(shared_lenet5, tmp_path / "a", "2024-01-02T00:00:00+00:00", 5)
    third = place(shared_lenet5, tmp_path / "b" / "c", "2024-01-02T00:00:00+00:00", 9)  # the same second
    first = place(shared_lenet5, tmp_path / "d", "2024-01-01T00:00:00+00:00", 99)  # copied here later
    assert [artifact.path for artifact in artifacts_under(tmp_path)] == [first, second, third]


def test_drafts_are_passed_over_and_what_is_broken_is_named(
    shared_lenet5: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place(shared_lenet5, tmp_path / ".net.0.partial", "2024-01-01T00:00:00+00:00", 1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / MANIFEST).write_text("{", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert artifacts_under(tmp_path) == []
    (record,) = caplog.records
    assert record.getMessage().startswith(f"left out: {tmp_path / 'broken' / MANIFEST} cannot be read")


def test_nothing_is_found_where_there_is_no_folder(tmp_path: Path) -> None:
    assert artifacts_under(tmp_path / "build") == []


def test_a_path_may_be_any_path_and_nothing_else(shared_lenet5: Artifact) -> None:
    class Where:
        def __fspath__(self) -> str:
            return str(shared_lenet5.path)

    assert open_artifact(Where()).manifest == shared_lenet5.manifest  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"expected an artifact, or the path of one or of an \.onnx file, not None"):
        open_artifact(None)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="no artifact at"):
        open_artifact(shared_lenet5.path / "missing")
