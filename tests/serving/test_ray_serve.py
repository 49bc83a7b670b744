"""`deploy serve --ray` on a cluster of two nodes, which are processes of this machine."""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import UsageError
from deploy.serving.models import ModelOptions
from deploy.serving.options import RayOptions, ServerOptions
from deploy.serving.source import ModelSource

from .conftest import SOAK, Caller, Server

pytest.importorskip("ray")

from ray.cluster_utils import Cluster

from deploy.serving.ray_serve import application

CLIENTS = 16 if SOAK else 4
SECONDS = 30.0 if SOAK else 3.0
START_S = 150.0
LIMIT_S = 500.0

pytestmark = pytest.mark.timeout(LIMIT_S + 60)  # on a busy machine Ray alone takes minutes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two CPUs each. Ray has as much patience with its doors and its nodes as the tests have with Ray: by itself it
    gives up those that do not answer in some seconds, which a busy machine may take."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("initial_delay", "period", "timeout"):
            patch.setenv(f"RAY_health_check_{name}_ms", str(int(START_S * 1000)))
        for name in ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"):
            patch.setenv(name, str(START_S))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        try:
            made.add_node(num_cpus=2)
            made.wait_for_nodes()
            yield made
        finally:
            made.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


def replicas() -> dict[int, str]:
    """The replicas that run on this machine: process numbers and titles."""
    titles = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith("ray::ServeReplica:deploy"):
            titles[int(entry.parent.name)] = title
    return titles


def answering_replicas(server: Server) -> set[str]:
    """The replicas that answer, by their metrics."""
    names = set()
    for _ in range(20):
        with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=30) as answer:
            names.update(re.findall(r'replica="([^"]+)"', answer.read().decode()))
    return names


class Load:
    """Clients that call without a pause until they are stopped; every answer is checked."""

    def __init__(self, server: Server, model: str, artifacts: list[Artifact]) -> None:
        self.answered = 0
        self.lost: list[tuple[float, str]] = []
        self.wrong = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._feeds = [
            np.random.default_rng(seed).standard_normal((1 + seed % 4, 1, 28, 28), dtype=np.float32) for seed in range(8)
        ]
        self._expected = []
        for artifact in artifacts:
            with deploy.load(artifact) as session:
                self._expected.append([session(x) for x in self._feeds])
        self._threads = [threading.Thread(target=self._run, args=(server, model, number)) for number in range(CLIENTS)]

    def _run(self, server: Server, model: str, number: int) -> None:
        call = Caller(server, model)
        turn = number
        while not self._stop.is_set():
            turn = (turn + 1) % len(self._feeds)
            try:
                result = call(self._feeds[turn])
            except Exception as error:
                with self._lock:
                    self.lost.append((time.monotonic(), repr(error)))
                call.close()
                call = Caller(server, model)
                continue
            right = any(np.allclose(result, expected[turn], rtol=1e-4, atol=1e-5) for expected in self._expected)
            with self._lock:
                self.answered += 1
                self.wrong += not right
        call.close()

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"


@pytest.fixture(scope="module")
def current(tmp_path_factory: pytest.TempPathFactory, versions: list[Artifact]) -> Path:
    """A link to the version to deploy."""
    link = tmp_path_factory.mktemp("ray") / "current"
    link.symlink_to(versions[0].path)
    return link


@pytest.fixture(scope="module")
def arguments(cluster: Cluster, port: int, current: Path) -> list[str]:
    doors = ["--http-port", str(port), "--grpc-port", str(free_port()), "--insecure"]
    return [
        f"net={current}",
        "--ray",
        cluster.address,
        *doors,
        "--replicas",
        "2",
        "--replicas-per-node",
        "1",
        "--max-request-mb",
        "1",
    ]


@pytest.mark.skipif(not SOAK, reason="Ray waits half a minute before it adds a replica: make soak")
def test_replicas_are_added_under_load(arguments: list[str], versions: list[Artifact]) -> None:
    scaled = [*arguments, "--max-replicas", "2", "--target-requests", "1"]
    scaled[scaled.index("--replicas") + 1] = "1"
    server = Server(scaled, doors=("http",))
    try:
        assert len(replicas()) == 1
        with Load(server, "net", versions) as load:
            end = time.monotonic() + START_S
            while len(answering_replicas(server)) < 2:
                assert time.monotonic() < end, "no replica was added"
                time.sleep(1.0)
        assert not load.lost, load.lost[:3]
        assert load.wrong == 0
        assert server.stop() == 0
    finally:
        server.kill()


def test_replicas_that_do_not_start_are_reported(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "deploy", "serve", *arguments, "--backend", "tensorrt", "--detach"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert finished.returncode == 1
    error = finished.stderr.splitlines()[-1]
    assert error.startswith("error: the models did not start on Ray: ")
    assert "BackendError: " in error
    assert "tensorrt" in error


@pytest.fixture(scope="module")
def server(arguments: list[str]) -> Iterator[Server]:
    """One replica on each node."""
    started = Server(arguments)
    assert len(replicas()) == 2
    yield started
    status = started.stop()
    started.kill()
    assert status == 0
    assert not replicas()


def test_a_replica_is_killed_under_load(server: Server, versions: list[Artifact]) -> None:
    first = replicas()
    with Load(server, "net", versions) as load:
        time.sleep(SECONDS)
        assert not load.lost
        before, killed_at = load.answered, time.monotonic()
        assert before > 0
        os.kill(next(iter(first)), signal.SIGKILL)
        end = time.monotonic() + START_S
        while replicas().keys() <= first.keys() or len(answering_replicas(server)) < 2:
            assert time.monotonic() < end, "no replica came in the place of the one that was killed"
            time.sleep(0.1)
        healed_at, healed = time.monotonic(), load.answered
        time.sleep(SECONDS)
    assert load.wrong == 0
    assert healed > before, "the other replica served meanwhile"
    assert load.answered > healed
    # What was under way in the replica is lost with it, and what was sent there before Ray noticed.
    assert len(load.lost) <= 4 * CLIENTS, load.lost[:3]
    assert all(killed_at <= when <= healed_at for when, _ in load.lost)


def test_another_version_is_deployed_under_load(
    server: Server, arguments: list[str], current: Path, versions: list[Artifact]
) -> None:
    first = replicas()
    with Load(server, "net", versions) as load:
        fresh = current.with_name("next")
        fresh.symlink_to(versions[1].path)
        os.replace(fresh, current)
        command = [sys.executable, "-m", "deploy", "serve", *arguments, "--detach"]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert finished.returncode == 0, finished.stderr
        before = load.answered
        time.sleep(1.0)
    assert load.answered > before
    assert not load.lost, load.lost[:3]
    assert load.wrong == 0
    assert not replicas().keys() & first.keys()
    with Load(server, "net", versions[1:]) as load:
        time.sleep(0.5)
    assert load.answered > 0
    assert load.wrong == 0, "the old version still answers"


def test_the_grpc_door_answers_as_everywhere(server: Server, current: Path) -> None:
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32)
    with deploy.load(current) as session:
        wanted = session(x)
    tensor = triton.InferInput("input", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    with triton.InferenceServerClient(server.grpc) as client:
        assert client.is_server_live()
        assert client.is_model_ready("net")
        assert client.get_model_metadata("net").inputs[0].name == "input"
        np.testing.assert_allclose(client.infer("net", [tensor]).as_numpy("logits"), wanted, rtol=1e-4, atol=1e-5)
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error or result))
        for name in ("net", "none", "net"):
            client.async_stream_infer(name, [tensor], request_id=name)
        heard = [answers.get(timeout=60) for _ in range(3)]
        client.stop_stream()
        for result in (heard[0], heard[2]):
            np.testing.assert_allclose(result.as_numpy("logits"), wanted, rtol=1e-4, atol=1e-5)
        assert "unknown model 'none'" in str(heard[1])


def test_the_grpc_door_refuses_as_everywhere(server: Server) -> None:
    def status(call: Any) -> tuple[str, str]:
        with pytest.raises(triton.InferenceServerException) as caught:
            call()
        return caught.value.status(), caught.value.message()

    large = triton.InferInput("input", [400, 1, 28, 28], "FP32")
    large.set_data_from_numpy(np.zeros((400, 1, 28, 28), np.float32))
    with triton.InferenceServerClient(server.grpc) as client:
        assert status(lambda: client.get_model_metadata("none"))[0] == "StatusCode.NOT_FOUND"
        assert status(lambda: client.infer("net", [large]))[0] == "StatusCode.RESOURCE_EXHAUSTED"
        for call in (client.load_model, client.unload_model):
            code, text = status(lambda call=call: call("net"))
            assert (code, "deploy again" in text) == ("StatusCode.PERMISSION_DENIED", True)
        assert [model.name for model in client.get_model_repository_index().models] == ["net"]


def test_what_one_replica_must_not_do_alone_is_refused(server: Server) -> None:
    assert len(answering_replicas(server)) == 2
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://{server.http}/v2/repository/models/net/load", data=b"", timeout=30)
    assert caught.value.code == 403
    with caught.value as answer:
        assert "deploy again" in answer.read().decode()


def test_a_page_in_a_browser_is_refused_here_too(server: Server) -> None:
    request = urllib.request.Request(f"http://{server.http}/v2", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    with caught.value as answer:
        assert answer.code == 403


def test_a_cluster_that_serves_at_another_address_is_not_taken_for_this_one(
    server: Server, arguments: list[str], port: int
) -> None:
    other = [str(port + 1) if text == str(port) else text for text in arguments]
    finished = subprocess.run([sys.executable, "-m", "deploy", "serve", *other], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert f"runs on this cluster with port {port}, not {port + 1}" in finished.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"http_port": None, "grpc_port": 1}, "leave out `no_http`"),
        ({"http_port": 0}, "cannot be 0"),
        ({"grpc_port": 0}, "cannot be 0"),
        ({"grpc_port": 1}, "Ray opens the gRPC door to other machines, whatever `host` is"),
        ({"admin_token": "x" * 20}, "no admin calls"),
        ({"shared_memory": True}, "is of one machine"),
        ({"connections": 7}, "`connections` cannot be set on Ray"),
        ({"connections_per_address": 7}, "`connections_per_address` cannot be set on Ray"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused(options: dict[str, object], message: str, versions: list[Artifact]) -> None:
    source = ModelSource(name="net", path=versions[0].path)
    with pytest.raises(UsageError, match=message):
        application([source], ModelOptions(), ServerOptions(**{"grpc_port": None, **options}), RayOptions())  # type: ignore[arg-type]


def test_scaling_is_rays(versions: list[Artifact]) -> None:
    source = ModelSource(name="net", path=versions[0].path)
    on = RayOptions(replicas=2, max_replicas=5, replicas_per_node=3, target_requests=7, replica_cpus=2, replica_gpus=0.5)
    deployment = application([source], ModelOptions(), ServerOptions(grpc_port=None), on)._bound_deployment
    scale = deployment._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas, scale.target_ongoing_requests) == (2, 5, 7)
    assert deployment._replica_config.max_replicas_per_node == 3
    assert deployment.ray_actor_options["num_cpus"] == 2
    assert deployment.ray_actor_options["num_gpus"] == 0.5
