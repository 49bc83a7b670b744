"""What `serving.py` measures beside throughput: shared memory against binary bodies, idle connections, and one client's large JSON."""

import contextlib
import http.client
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_harness import in_turns
from onnx import TensorProto, helper

SIDE = 512
"""The large input: 1 x 512 x 512 floats, 1 MiB a request."""


def sums(path: Path) -> Path:
    """A model that takes 1 MiB and gives one number: all of its time is that of the tensor's way."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMax", ["input"], ["most"], axes=[1, 2], keepdims=0)],
        "most",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", SIDE, SIDE])],
        [helper.make_tensor_value_info("most", TensorProto.FLOAT, ["batch"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def shared_memory(port: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Requests a second of one caller with 1 MiB a request: `binary` in the body, `shared` in a region, in turns, by tritonclient."""
    import tritonclient.http as triton
    from tritonclient.utils import shared_memory as memory

    x = np.random.default_rng(0).standard_normal((1, SIDE, SIDE), dtype=np.float32)
    handle = memory.create_shared_memory_region("x", "/deploy_benchmark", x.nbytes, create_only=True)
    try:
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            client.register_system_shared_memory("x", "/deploy_benchmark", x.nbytes)
            body, place = (triton.InferInput("input", list(x.shape), "FP32") for _ in range(2))
            place.set_shared_memory("x", x.nbytes)

            def binary() -> None:
                body.set_data_from_numpy(x)  # as a client does with each new tensor
                client.infer("most", [body])

            def shared() -> None:
                memory.set_shared_memory_region(handle, [x])
                client.infer("most", [place])

            return in_turns(
                {"binary": lambda: _rate(binary, seconds), "shared": lambda: _rate(shared, seconds)}, rounds, warm_up=1
            )
    finally:
        memory.destroy_shared_memory_region(handle)


def _rate(call: Callable[[], None], seconds: float) -> float:
    start = now = time.perf_counter()
    count = 0
    while now - start < seconds:
        call()
        count += 1
        now = time.perf_counter()
    return count / (now - start)


def idle_connections(port: int, count: int, asks: int) -> list[float]:
    """Milliseconds of `asks` liveness checks, each on a connection of its own, while `count` others are open and say nothing."""
    with contextlib.ExitStack() as stack:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for _ in range(count):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        times = []
        for _ in range(asks):
            start = time.perf_counter()
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as client:
                client.request("GET", "/v2/health/live")
                if client.getresponse().status != 200:
                    sys.exit("the server does not say that it lives")
            times.append((time.perf_counter() - start) * 1e3)
        return times


@contextmanager
def one_caller(port: int, request: tuple[str, bytes]) -> Iterator[list[float]]:
    """The milliseconds of the requests that one caller makes meanwhile, one every 2 ms."""
    times: list[float] = []
    stop = threading.Event()

    def run() -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
            while not stop.wait(0.002):
                start = time.perf_counter()
                client.request("POST", *request)
                client.getresponse().read()
                times.append((time.perf_counter() - start) * 1e3)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield times
    finally:
        stop.set()
        thread.join()


def large_json(port: int, large: str, small: str, folder: Path, mib: int) -> dict[str, Any]:
    """The slowest request for the model `small` while another process sends JSON of `mib` MiB for `large`, and without it, in milliseconds."""
    head = '{"inputs": [{"name": "input", "datatype": "FP32", "shape": %s, "data": [%s]}]}'
    rng = np.random.default_rng(0)
    text = ", ".join(map(repr, rng.standard_normal(SIDE * SIDE).tolist()))
    rows = max(1, (mib << 20) // len(text))
    file = folder / "large.json"
    file.write_text(head % ([rows, SIDE, SIDE], ", ".join([text] * rows)))
    asked = (
        f"/v2/models/{small}/infer",
        (head % ([1, 1, 28, 28], ", ".join(map(repr, rng.standard_normal(784).tolist())))).encode(),
    )
    program = (
        "import http.client, sys; client = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]), timeout=300);"
        " client.request('POST', sys.argv[2], open(sys.argv[3], 'rb').read()); answer = client.getresponse(); answer.read();"
        " sys.exit(answer.status != 200)"
    )
    with one_caller(port, asked) as alone:
        time.sleep(2)
    with one_caller(port, asked) as beside:
        subprocess.run([sys.executable, "-c", program, str(port), f"/v2/models/{large}/infer", str(file)], check=True)
    return {"mib": mib, "alone_ms": max(alone), "beside_ms": max(beside), "p50_alone_ms": statistics.median(alone)}
