"""`deploy serve` as its users start it: a process of its own, on free ports, with real artifacts."""

import http.client
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact
from deploy.models.registry import create

START_S = 150  # Ray needs more than a minute beside two busy processes

TOKEN, ADMIN = "a-token-of-24-characters", "another-for-the-admin-call"
INFER, LOAD = "/v2/models/digits/infer", "/v2/repository/models/digits/load"

SOAK = bool(os.environ.get("DEPLOY_SOAK"))
"""`make soak`: as many requests as it takes to trust a server, in place of a few."""


class Server:
    """A running `deploy serve`; `log` are its lines on standard error."""

    def __init__(self, arguments: list[str], env: dict[str, str] | None = None, doors: Sequence[str] = ("http", "grpc")) -> None:
        ports = [] if "--ray" in arguments else [text for door in doors for text in (f"--{door}-port", "0")]
        command = [sys.executable, "-m", "deploy", "serve", *ports, *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
        self.log: list[dict[str, Any]] = []
        self.other: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            addresses = {door: self._address(door).rpartition("//")[2] for door in doors}
        except BaseException:
            self.kill()
            raise
        self.http = addresses.get("http", "")
        self.grpc = addresses.get("grpc", "")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.other.append(line)

    def _address(self, door: str) -> str:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            for line in list(self.log):
                if line.get("message") == "serving" and line.get("door") == door:
                    return str(line["address"])
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the server did not come up: {self.other} {self.log}")

    @property
    def resident_bytes(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit status."""
        self.process.send_signal(number)
        status = self.process.wait(60)
        self._reader.join(10)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()


def call(
    server: Server, path: str, data: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, Any, Any]:
    """Status, JSON document and headers of the answer of the REST door, to a POST when there are `data`."""
    request = urllib.request.Request(f"http://{server.http}{path}", data=data, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read() or b"{}"), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"{}"), error.headers


def body(rows: int = 1) -> bytes:
    """A request in JSON for `lenet5`."""
    data = np.zeros((rows, 1, 28, 28)).reshape(-1).tolist()
    return json.dumps({"inputs": [{"name": "input", "datatype": "FP32", "shape": [rows, 1, 28, 28], "data": data}]}).encode()


class Caller:
    """A client of the REST door, binary, on a connection that it keeps."""

    def __init__(self, server: Server, model: str) -> None:
        host, _, port = server.http.partition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=60)
        self._path = f"/v2/models/{model}/infer"

    def __call__(self, x: np.ndarray) -> np.ndarray:
        head = json.dumps(
            {
                "inputs": [{"name": "input", "datatype": "FP32", "shape": x.shape, "parameters": {"binary_data_size": x.nbytes}}],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        self._connection.request("POST", self._path, head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise AssertionError(f"{answer.status}: {content!r}")
        return np.frombuffer(content[int(answer.headers["Inference-Header-Content-Length"]) :], np.float32).reshape(len(x), -1)

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """`serve("build/net", "--max-batch", 4)` starts a server, which ends with the test."""
    started: list[Server] = []

    def start(*arguments: object, env: dict[str, str] | None = None) -> Server:
        started.append(Server([str(argument) for argument in arguments], env))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def limited(shared_lenet5: Artifact) -> Iterator[Server]:
    """A server of `digits` with small limits, which many tests share: they must not change its models."""
    started = Server([f"digits={shared_lenet5.path}", "--max-request-mb", "1", "--max-pixels", "4000000"])
    yield started
    started.kill()


@pytest.fixture(scope="session")
def closed(shared_lenet5: Artifact) -> Iterator[Server]:
    """A server of `digits` with a token, and another token for admin calls."""
    started = Server([f"digits={shared_lenet5.path}"], {"DEPLOY_TOKEN": TOKEN, "DEPLOY_ADMIN_TOKEN": ADMIN})
    yield started
    started.kill()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two inputs of different dtypes, two outputs: scaled = image * factor summed, and the factor back."""
    folder = tmp_path_factory.mktemp("pair")
    text = """
        import torch

        class Pair(torch.nn.Module):
            def forward(self, image, factor):
                return {"total": (image * factor.float()).sum(dim=1, keepdim=True), "factor_back": factor * 2}
    """
    (folder / "pair_net.py").write_text(textwrap.dedent(text), encoding="utf-8")
    inputs = ["image=1x4", "factor=1x4:int64"]
    return deploy.export(folder / "pair", model=f"{folder / 'pair_net.py'}:Pair", inputs=inputs, outputs=["total", "factor_back"])


@pytest.fixture(scope="session")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random `lenet5` whose batch is fixed at 1."""
    return deploy.export(tmp_path_factory.mktemp("fixed") / "fixed", arch="lenet5", static_batch=True)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small PNG files."""
    folder = tmp_path_factory.mktemp("digits")
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    """Two nets of the same shape with different weights."""
    import torch

    folder = tmp_path_factory.mktemp("versions")
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(create("lenet5").state_dict(), folder / f"{seed}.pth")
        made.append(deploy.export(folder / f"net{seed}", arch="lenet5", weights=folder / f"{seed}.pth"))
    return made
