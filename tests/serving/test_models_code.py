"""Artifacts with code of their user's are served where that is allowed, and only there."""

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import UsageError, UserCodeError
from deploy.serving.models import ModelOptions, Models
from deploy.serving.source import ModelSource

from .conftest import Server, call

NET = """
    <ir_version: 10, opset_import: ["" : 20]>
    net (float[batch, 3, 2, 2] x) => (float[batch, 12] scores) { scores = Flatten(x) }
"""

CODE = """\
import numpy as np

def prepare(image):
    small = image.convert("RGB").resize((2, 2))
    return np.asarray(small, dtype=np.float32)[None].transpose(0, 3, 1, 2) / 50

def rgb_only(image):
    assert image.mode == "RGB", "no colours"
    return prepare(image)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(NET), tmp_path / "net.onnx")
    (tmp_path / "prep.py").write_text(CODE)
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (9 + index, 7, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    Image.new("L", (9, 9), 200).save(tmp_path / "grey.png")
    return tmp_path


@pytest.fixture
def export(project: Path) -> Callable[..., Artifact]:
    def make(name: str, preprocess: str) -> Artifact:
        return deploy.export(project / name, onnx=project / "net.onnx", preprocess=preprocess)

    return make


def models_of(artifact: Artifact, **options: Any) -> Models:
    return Models([ModelSource(name="net", path=artifact.path)], ModelOptions(**options))


def test_an_artifact_with_code_is_refused_in_one_line_and_its_code_does_not_run(
    project: Path, export: Callable[..., Artifact], tmp_path: Path
) -> None:
    (project / "prep.py").write_text(CODE + f"with open({str(tmp_path / 'ran')!r}, 'w'):\n    pass\n")
    artifact = export("net", f"{project / 'prep.py'}:prepare")
    (tmp_path / "ran").unlink()
    command = [sys.executable, "-m", "deploy", "serve", "--http-port", "0", "--no-grpc", str(artifact.path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "runs code of its user's (prep.py:prepare); serve it with --allow-code" in refused.stderr
    assert not (tmp_path / "ran").exists()


def test_a_module_is_code_too(project: Path, export: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(project)
    shutil.copy(project / "prep.py", project / "prep_for_the_server.py")
    artifact = export("net", "prep_for_the_server:prepare")
    with pytest.raises(UsageError, match=r"runs code of its user's \(prep_for_the_server:prepare\)"):
        models_of(artifact).load_all()
    models = models_of(artifact, allow_code=True, backend="onnxruntime")
    models.load_all()
    models.close()


def test_what_the_code_lacks_is_found_when_the_server_starts(project: Path, export: Callable[..., Artifact]) -> None:
    (project / "prep.py").write_text(CODE + f"open({str(project / 'net.onnx')!r}).close()\n")
    artifact = export("net", f"{project / 'prep.py'}:prepare")
    (project / "net.onnx").unlink()
    with pytest.raises(UserCodeError, match=r"prep\.py fails when it is imported: FileNotFoundError"):
        models_of(Artifact.open(shutil.copytree(artifact.path, project / "copy")), allow_code=True).load_all()


def test_a_model_that_has_code_when_it_is_loaded_anew_is_refused_and_the_old_one_stays(
    project: Path, export: Callable[..., Artifact]
) -> None:
    models = models_of(export("net", "none"), backend="onnxruntime")
    models.load_all()
    before = models.get("net")
    export("net", f"{project / 'prep.py'}:prepare")
    with pytest.raises(UsageError, match="runs code of its user's"):
        models.load("net")
    assert models.get("net") is before
    export("net", "none")
    models.load("net")
    assert models.get("net") is not before
    models.close()


def test_an_allowed_server_classifies_what_the_function_makes_of_the_image(
    project: Path, export: Callable[..., Artifact], serve: Callable[..., Server]
) -> None:
    artifact = export("net", f"{project / 'prep.py'}:rgb_only")
    server = serve(artifact.path, "--allow-code", "--backend", "onnxruntime")
    for index in range(3):
        path = project / f"{index}.png"
        (expected,) = deploy.predict(artifact, path, top=12)
        with urllib.request.urlopen(f"http://{server.http}/v2/models/net/classify?top=12", data=path.read_bytes()) as answer:
            found = {entry["class"]: entry["probability"] for entry in json.load(answer)["classes"]}
        assert found == pytest.approx(dict(expected.classes), rel=1e-6)
    status, document, _ = call(server, "/v2/models/net/classify", (project / "grey.png").read_bytes())
    assert status == 500
    assert "prep.py:rgb_only fails: AssertionError: no colours" in document["error"]
    assert call(server, "/v2/repository/models/net/load", b"")[0] == 200
