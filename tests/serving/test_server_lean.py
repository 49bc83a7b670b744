"""`deploy serve` on a host that has the runtime and little else: what it loads, and what it says where a library is missing."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import WEIGHTS
from deploy.serving.source import ModelSource
from deploy.serving.triton import export_triton

from .conftest import Caller, Server, call

SITE = """
    import atexit, json, os, pathlib, sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in os.environ.get("MISSING", "").split(","):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def report():
        pathlib.Path(os.environ["LOADED"]).write_text(json.dumps(sorted(sys.modules)))

    sys.meta_path.insert(0, Missing())
    if "LOADED" in os.environ:
        atexit.register(report)
"""
"""Read by every Python process that has its folder on the path: hides the libraries `MISSING`, writes the loaded modules to `LOADED`."""

MAKERS = ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "ml_dtypes")
"""What makes artifacts: the extra `export`."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment that reads `SITE`, without the libraries that make artifacts."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(textwrap.dedent(SITE), encoding="utf-8")
    folders = [str(tmp_path / "site"), str(Path(deploy.__file__).parents[1])]
    return {"PYTHONPATH": os.pathsep.join(folders), "LOADED": str(tmp_path / "loaded.json"), "MISSING": ",".join(MAKERS)}


def served(environment: dict[str, str], *arguments: object, missing: str) -> tuple[int, list[str], set[str]]:
    """Exit status, the lines on standard error and the loaded modules of a `deploy serve` that is to fail for what is `missing`."""
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "serve", *map(str, arguments)],
        env={**os.environ, **environment, "MISSING": f"{environment['MISSING']},{missing}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    loaded = set(json.loads(Path(environment["LOADED"]).read_text()))
    return done.returncode, done.stderr.splitlines(), loaded


def test_a_server_of_onnx_loads_nothing_that_makes_artifacts(
    shared_lenet5: Artifact, digits: Path, serve: Callable[..., Server], environment: dict[str, str]
) -> None:
    server = serve(f"digits={shared_lenet5.path}", env=environment)
    client = Caller(server, "digits")
    assert client(np.zeros((2, 1, 28, 28), np.float32)).shape == (2, 10)
    client.close()
    assert call(server, "/v2/models/digits/classify", (digits / "0.png").read_bytes())[0] == 200
    assert server.stop() == 0
    loaded = json.loads(Path(environment["LOADED"]).read_text())
    assert "deploy.serving.rest_app" in loaded
    assert "deploy.serving.grpc_door" in loaded
    rooms = ("deploy.bench", "deploy.calibration", "deploy.models", "deploy.intake", "deploy.precision", "deploy.pipeline")
    heavy = [name for name in loaded if name.partition(".")[0] in (*MAKERS, "ray") or name.startswith(rooms)]
    assert not heavy


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        ([], "starlette", "serving"), ([], "uvicorn", "serving"), ([], "grpc", "serving"), ([], "google", "serving"),
        ([], "starlette,uvicorn,grpc,google", "serving"), (["--no-http"], "grpc", "serving"), (["--no-grpc"], "uvicorn", "serving"),
        (["--ray"], "ray", "ray"), (["--ray"], "ray,starlette,uvicorn,grpc", "ray"), (["--ray", "local"], "fastapi", "ray"),
    ],
)  # fmt: skip
def test_a_missing_library_is_reported_in_one_line_before_the_models_are_loaded(
    shared_lenet5: Artifact, environment: dict[str, str], arguments: list[str], missing: str, extra: str
) -> None:
    status, lines, loaded = served(environment, shared_lenet5.path, *arguments, missing=missing)
    assert status == 1
    (line,) = lines
    assert line.startswith("error: deploy serve needs ")
    assert line.endswith(f", which is not installed: pip install 'deploy[{extra}]'")
    assert "onnxruntime" not in loaded


@pytest.mark.parametrize(("door", "missing"), [("http", "grpc,google"), ("grpc", "starlette,uvicorn")])
def test_a_door_that_stays_shut_needs_no_library(
    shared_lenet5: Artifact, environment: dict[str, str], door: str, missing: str
) -> None:
    shut = "--no-grpc" if door == "http" else "--no-http"
    environment["MISSING"] += f",{missing}"
    server = Server([f"digits={shared_lenet5.path}", shut], environment, doors=(door,))
    try:
        assert server.stop() == 0
    finally:
        server.kill()


def test_help_and_wrong_usage_need_no_library(environment: dict[str, str]) -> None:
    for arguments in (["--help"], []):
        status, lines, _ = served(environment, *arguments, missing="starlette,uvicorn,grpc,google,ray")
        assert (status, any("not installed" in line for line in lines)) == (2 if not arguments else 0, False)


@pytest.mark.parametrize("harm", ["damaged", "cut off", "gone"])
def test_weights_that_cannot_be_used_are_no_hindrance_to_what_does_not_use_them(
    lenet5: Artifact, serve: Callable[..., Server], environment: dict[str, str], tmp_path: Path, harm: str
) -> None:
    weights = lenet5.path / WEIGHTS
    content = weights.read_bytes()
    weights.unlink()
    if harm != "gone":
        weights.write_bytes(content[:-4] if harm == "cut off" else content[:-4] + b"\xff\xff\xff\xff")
    client = Caller(serve(f"digits={lenet5.path}", env=environment), "digits")
    assert client(np.zeros((1, 1, 28, 28), np.float32)).shape == (1, 10)
    client.close()
    (folder,) = export_triton([ModelSource(name="digits", path=lenet5.path)], tmp_path / "repo")
    assert (folder / "model.onnx").is_file()


def test_weights_of_another_user_that_cannot_be_opened_are_no_hindrance(
    lenet5: Artifact, serve: Callable[..., Server], environment: dict[str, str]
) -> None:
    """A folder in the place of the file, for a test that runs as root can open any file."""
    weights = lenet5.path / WEIGHTS
    weights.unlink()
    weights.mkdir()
    client = Caller(serve(f"digits={lenet5.path}", env=environment), "digits")
    assert client(np.zeros((1, 1, 28, 28), np.float32)).shape == (1, 10)
    client.close()
