"""Requests while models are swapped, unloaded and loaded: none is lost, each is answered by one version alone."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client

import deploy
from deploy.artifact.artifact import Artifact

from .conftest import SOAK, Caller, Server

CLIENTS = 64 if SOAK else 8
REQUESTS = 100_000 if SOAK else 2_000
EVERY_S = 1.0 if SOAK else 0.15


class GrpcCaller:
    def __init__(self, server: Server, model: str) -> None:
        self._client = grpc_client.InferenceServerClient(server.grpc)
        self._model = model

    def __call__(self, x: np.ndarray) -> np.ndarray:
        tensor = grpc_client.InferInput("input", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        result: np.ndarray = self._client.infer(self._model, [tensor]).as_numpy("logits")
        return result

    def close(self) -> None:
        self._client.close()


def admin(server: Server, path: str) -> Any:
    with urllib.request.urlopen(f"http://{server.http}/v2/repository/{path}", data=b"", timeout=60) as answer:
        return json.loads(answer.read())


def test_nothing_is_lost_or_mixed_while_the_model_is_swapped(
    versions: list[Artifact], tmp_path: Path, serve: Callable[..., Server]
) -> None:
    link = tmp_path / "current"
    link.symlink_to(versions[0].path)
    server = serve(f"net={link}", "--max-batch", "16", "--delay-ms", "0.5")  # a delay, so that batches are of several
    rng = np.random.default_rng(0)
    feeds = [rng.standard_normal((1 + seed % 4, 1, 28, 28), dtype=np.float32) for seed in range(40)]
    with deploy.load(versions[0]) as first, deploy.load(versions[1]) as second:
        expected = [(first(x), second(x)) for x in feeds]
    share = REQUESTS // CLIENTS
    answered: Counter[str] = Counter()
    wrong: list[str] = []
    lock = threading.Lock()

    def client(number: int) -> None:
        call: Any = (Caller if number % 2 else GrpcCaller)(server, "net")
        own: Counter[str] = Counter()
        for turn in range(share):
            index = (number * 7 + turn) % len(feeds)
            try:
                result = call(feeds[index])
            except Exception as error:
                wrong.append(f"lost: {error!r}")
                break
            fits = [np.allclose(result, wanted, rtol=1e-4, atol=1e-5) for wanted in expected[index]]
            if not any(fits):
                wrong.append(f"request {index} was answered by neither version")
            own["first" if fits[0] else "second"] += 1
        call.close()
        with lock:
            answered.update(own)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    swaps = 0
    while any(thread.is_alive() for thread in threads):
        time.sleep(EVERY_S)
        swaps += 1
        fresh = tmp_path / "next"
        fresh.symlink_to(versions[swaps % 2].path)
        os.replace(fresh, link)
        admin(server, "models/net/load")
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert answered.total() == share * CLIENTS
    assert min(answered["first"], answered["second"]) > share * CLIENTS / 20
    assert swaps >= 3
    (entry,) = json.load(urllib.request.urlopen(f"http://{server.http}/v2/models/net/stats"))["model_stats"]
    assert entry["inference_stats"]["success"]["count"] == share * CLIENTS
    assert entry["execution_count"] < share * CLIENTS  # there were batches


def test_a_model_that_cannot_be_loaded_leaves_the_old_one_at_work(lenet5: Artifact, serve: Callable[..., Server]) -> None:
    server = serve(f"net={lenet5.path}")
    call = Caller(server, "net")
    x = np.zeros((2, 1, 28, 28), np.float32)
    before = call(x)
    content = lenet5.onnx_path.read_bytes()
    lenet5.onnx_path.write_bytes(content[: len(content) // 2])
    with pytest.raises(urllib.error.HTTPError) as caught:
        admin(server, "models/net/load")
    with caught.value as error:
        assert "damaged" in json.loads(error.read())["error"]
    np.testing.assert_array_equal(call(x), before)
    assert admin(server, "index")[0]["state"] == "READY"
    admin(server, "models/net/unload")
    (entry,) = admin(server, "index")
    assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "unloaded")
    with pytest.raises(AssertionError, match=r"503: .* is not ready: unloaded"):
        call(x)
    lenet5.onnx_path.write_bytes(content)
    admin(server, "models/net/load")
    np.testing.assert_array_equal(call(x), before)
    call.close()


def test_memory_stays_flat(shared_lenet5: Artifact, serve: Callable[..., Server]) -> None:
    """A hundred thousand requests take no more memory than the first ten thousand."""
    server = serve(f"net={shared_lenet5.path}")
    total = 100_000 if SOAK else 3_000
    marks: list[int] = []
    lock = threading.Lock()
    done = 0

    def client(number: int) -> None:
        nonlocal done
        call = Caller(server, "net")
        x = np.random.default_rng(number).standard_normal((1 + number % 3, 1, 28, 28), dtype=np.float32)
        while True:
            with lock:
                if done == total:
                    break
                done += 1
                if done == total // 10:
                    marks.append(server.resident_bytes)
            call(x)
        call.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.resident_bytes < marks[0] * 1.05
