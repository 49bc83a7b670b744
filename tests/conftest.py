"""Small real artifacts that many tests start from."""

import fcntl
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

import deploy
from deploy.artifact.artifact import Artifact
from deploy.bench.roofline import measure_peak
from deploy.cli import main

FIRST = ("test_ray_serve.py", "test_docs.py", "test_export.py", "test_bench.py", "test_gpu_report.py", "test_install.py")
"""The files that take longest: begun last, one process would end with them while the other has nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What deploy keeps between runs is found in a folder of its own here, and not with the developer's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def peak_of_the_machine() -> Iterator[None]:
    """What the machine can compute and copy is measured once, and not two seconds long by every benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.bench.bench.measure_peak", functools.cache(measure_peak))
        yield


@pytest.fixture(scope="session", autouse=True)
def functions_of_the_exporter() -> Iterator[None]:
    """PyTorch's table of ONNX functions is read once, and not half a second long by every export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], Any]], Any]:
    """`once("name", make)`: the JSON value that `make` returns, made by one process of the run and read by the others."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[], Any]) -> Any:
        with (folder / f"{name}.json").open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            if not text:
                text = json.dumps(make())
                file.write(text)
            return json.loads(text)

    return get


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, once: Callable[..., str]) -> Callable[[str], Artifact]:
    """`reference("resnet18")`: the artifact of a reference architecture with random weights, made by one process of the run.

    Networks for images of 224x224 are made for 64x64. Tests must not change it.
    """
    large = ("resnet18", "mobilenet_v1", "mobilenet_v1_features")

    def get(name: str) -> Artifact:
        inputs = ["input=1x3x64x64"] if name in large else []
        folder = tmp_path_factory.mktemp("reference")
        return Artifact.open(once(f"reference-{name}", lambda: str(deploy.export(folder / name, arch=name, inputs=inputs).path)))

    return get


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare ONNX file: y = relu(x @ w), x of shape (batch, 4) and y (batch, 3), float32."""
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        tiny (float[batch, 4] x) => (float[batch, 3] y)
        <float[4, 3] w = {1, -2, 3, 4, 5, -6, 7, 8, 9, -1, 0, 2}> {
            [product] z = MatMul(x, w)
            [clip] y = Relu(z)
        }
    """
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture(scope="session")
def shared_lenet5(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The artifact of a random `lenet5`; tests must not change it."""
    return deploy.export(tmp_path_factory.mktemp("lenet5") / "lenet5", arch="lenet5")


@pytest.fixture(scope="session")
def package(reference: Callable[[str], Artifact], tmp_path_factory: pytest.TempPathFactory, once: Callable[..., str]) -> Artifact:
    """`reference("lenet5")` compiled by AOTInductor for the CPU, by one process of the run. Tests must not change it."""
    out = tmp_path_factory.mktemp("package") / "lenet5"
    return Artifact.open(once("package-lenet5", lambda: str(deploy.build_aoti(reference("lenet5"), out, device="cpu").path)))


@pytest.fixture
def lenet5(shared_lenet5: Artifact, tmp_path: Path) -> Artifact:
    """A copy of the artifact of a random `lenet5`, for tests that change it."""
    shutil.copytree(shared_lenet5.path, tmp_path / "lenet5")
    return Artifact.open(tmp_path / "lenet5")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Runs the command line in this process: `run("export", "--arch", "mlp")`."""

    def call(*args: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["deploy", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Finished(status=int(ended.value.code or 0), out=captured.out, err=captured.err)

    return call
