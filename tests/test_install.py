"""The installed package with ONNX Runtime alone beside it, in an environment of its own: the service host of the README."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact

ROOT = Path(__file__).parents[1]


class Lean:
    """A virtual environment; `wheel` is the package."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        self.wheel = wheel
        venv.create(folder)  # without pip: the one of this environment installs into it

    def install(self, *requirements: str) -> None:
        pinned = ["--constraint", str(ROOT / "requirements.lock")]
        pip = [sys.executable, "-m", "pip", "--python", str(self.folder / "bin/python"), "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "install", "--no-compile", *pinned, *requirements], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {**kept, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def run(self, *command: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
        words = [str(self.folder / "bin" / str(command[0])), *map(str, command[1:])]
        return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=self.environment(), timeout=120)


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Lean:
    """The wheel as `pip` builds it of a clean checkout, installed with onnxruntime and nothing else."""
    folder = tmp_path_factory.mktemp("lean")
    source = folder / "source"
    for name in ("deploy", "models", "calibration"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    made = Lean(folder / "venv", wheel)
    made.install(str(wheel), "onnxruntime")
    return made


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was copied to the service host: an artifact, `net`, and pictures of two digits."""
    folder = tmp_path_factory.mktemp("host")
    deploy.export(folder / "net", arch="lenet5")
    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / "digits" / str(label)).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / "digits" / str(label) / "0.png")
    return folder


def test_neither_torch_nor_onnx_comes_along(lean: Lean) -> None:
    found = {path.name.partition("-")[0] for path in lean.folder.glob("lib/python*/site-packages/*.dist-info")}
    assert {"deploy", "onnxruntime", "numpy", "msgspec"} <= found
    assert not found & {"torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "sympy", "grpcio"}


def test_an_artifact_is_loaded_and_run(lean: Lean, host: Path) -> None:
    code = (
        "import deploy, numpy, sys\n"
        "x = numpy.load(sys.argv[1])\n"
        "with deploy.load('net') as session, deploy.Batcher(session) as batcher:\n"
        "    numpy.save('batched.npy', batcher.run({'input': x})['logits'])\n"
        "    numpy.save('logits.npy', session(x))\n"
    )
    x = np.random.default_rng(1).standard_normal((3, 1, 28, 28), dtype=np.float32)
    np.save(host / "x.npy", x)
    done = lean.run("python", "-c", code, "x.npy", cwd=host)
    assert (done.returncode, done.stderr) == (0, "")
    with deploy.load(host / "net") as session:
        np.testing.assert_allclose(np.load(host / "logits.npy"), session(x), rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.load(host / "batched.npy"), session(x), rtol=0, atol=1e-6)


def test_the_commands_of_a_service_host_work(lean: Lean, host: Path) -> None:
    predicted = lean.run("deploy", "predict", "net", "digits/3/0.png", "--json", cwd=host)
    assert predicted.returncode == 0, predicted.stderr
    (expected,) = deploy.predict(host / "net", host / "digits/3/0.png")
    classes = json.loads(predicted.stdout)["predictions"][0]["classes"]
    assert [each["class"] for each in classes] == [name for name, _ in expected.classes]
    evaluated = lean.run("deploy", "eval", "net", "digits", "--json", cwd=host)
    assert json.loads(evaluated.stdout)["top1"] == deploy.evaluate(host / "net", host / "digits").top1
    inspected = lean.run("deploy", "inspect", "net", "--json", cwd=host)
    assert json.loads(inspected.stdout)["digest"] == Artifact.open(host / "net").manifest.digest
    doctor = lean.run("deploy", "doctor", "--json", cwd=host)
    assert doctor.returncode == 0, doctor.stderr
    report = json.loads(doctor.stdout)
    available = {backend["name"] for backend in report["backends"] if backend["available"]}
    assert available == {"onnxruntime", "null"}


@pytest.mark.parametrize(
    ("arguments", "library", "extra"),
    [
        (("export", "--arch", "mlp"), "torch", "export"),
        (("convert", "net", "--fp16"), "onnx", "export"),
        (("quantize", "net", "--calib", "digits"), "onnx", "export"),
        (("build-aoti", "net"), "torch", "export"),
        (("build-trt", "net"), "tensorrt-rtx", "cpu"),
        (("bench", "net"), "onnx", "export"),
        (("predict", "net/model.onnx", "digits/3/0.png"), "onnx", "export"),
        (("serve", "net"), "", "serving"),
        (("serve", "net", "--ray"), "", "ray"),
        (("eval", "net", "digits", "--backend", "openvino"), "openvino", "cpu"),
        (("eval", "net", "digits", "--backend", "eager"), "torch", "export"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_what_needs_more_says_so_in_one_line(
    lean: Lean, host: Path, arguments: tuple[str, ...], library: str, extra: str
) -> None:
    done = lean.run("deploy", *arguments, cwd=host)
    assert done.returncode == 1, done.stdout
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("using ")]
    assert line.startswith("error: ")
    assert library in line
    assert f"pip install 'deploy[{extra}]'" in line


@pytest.fixture(scope="module")
def serving(lean: Lean) -> Lean:
    """The same environment with the extra `serving`. The tests that want it without come before."""
    lean.install(f"deploy[serving] @ {lean.wheel.as_uri()}")
    return lean


@pytest.fixture
def server(serving: Lean, host: Path) -> Iterator[str]:
    """The address of the REST door of a server."""
    command = [str(serving.folder / "bin/deploy"), "serve", "net", "--http-port", "0", "--grpc-port", "0"]
    with subprocess.Popen(command, cwd=host, env=serving.environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                told = json.loads(line)
                if told.get("door") == "http":
                    yield str(told["address"])
                    break
            else:
                pytest.fail("the server did not come up")
        finally:
            process.terminate()


def test_the_server_answers(server: str, host: Path) -> None:
    x = np.random.default_rng(2).standard_normal((2, 1, 28, 28), dtype=np.float32)
    body = {"inputs": [{"name": "input", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}]}
    request = urllib.request.Request(f"{server}/v2/models/net/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        (output,) = json.load(answer)["outputs"]
    with deploy.load(host / "net") as session:
        np.testing.assert_allclose(np.array(output["data"]).reshape(output["shape"]), session(x), rtol=0, atol=1e-5)
