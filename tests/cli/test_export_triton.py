import shutil
from pathlib import Path
from typing import Any

from deploy.artifact.artifact import Artifact


def test_a_damaged_artifact_is_not_exported(lenet5: Artifact, tmp_path: Path, run: Any) -> None:
    done = run("export-triton", lenet5.path, "-o", tmp_path / "repo")
    assert done.status == 0, done.err
    assert f"{tmp_path}/repo/lenet5/1" in done.out
    shutil.rmtree(tmp_path / "repo")
    lenet5.onnx_path.write_bytes(lenet5.onnx_path.read_bytes()[:-5])
    done = run("export-triton", lenet5.path, "-o", tmp_path / "repo")
    assert done.status == 1
    assert "damaged" in done.err
    assert not (tmp_path / "repo").exists()
