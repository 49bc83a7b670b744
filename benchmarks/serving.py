"""The overhead of `deploy serve`, and its throughput beside LitServe and MLServer: one run, one machine, one client.

    make serving-peers
    python benchmarks/serving.py

- `resnet34` in INT8 on OpenVINO, single images from 8 callers in a closed loop: images a second over those of the bare session at its best
  batch (goal: at least 0.9). The server computes two batches of 2 at a time (`--max-batch 2 --instances 2`), each on a stream of OpenVINO's
  with its own thread, while the images of the other callers wait; the bare session computes one batch on both threads.
- `lenet5`: p50 of REST with binary tensors and one caller, less p50 of the bare session (goal: at most 0.35 ms).
- `lenet5`, 32 callers: requests a second over those of LitServe (goal: at least 3) and of MLServer (at least 1.8), all with JSON. With binary
  tensors too.
- 1 MiB a request, one caller: requests a second with shared memory over those with binary bodies (goal: at least 1.5).
- 2,000 idle connections: the slowest of 50 liveness checks (goal: under 100 ms).
- 60 MiB of JSON from one client, which are answered: the slowest small request of another meanwhile, less the slowest without it (goal: at most 50 ms).

Each figure is the median of `--rounds` paired runs. `--quick` tries everything in short, and its figures mean nothing.

The sides take turns in rounds; the others are stopped meanwhile. The client is one thread on raw sockets, and shares the machine with the server.
"""

import gc
import json
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bench_harness import (
    HERE,
    Goal,
    add_peers,
    bullets,
    check_peers,
    conditions_here,
    conditions_line,
    exit_status,
    in_turns,
    make_parser,
    publish,
)
from PIL import Image
from serving_bounds import idle_connections, large_json, shared_memory, sums

import deploy
from deploy.artifact.artifact import Artifact
from deploy.runtime.session import SessionOptions
from deploy.runtime.worker.process import WorkerProcess

MAKE = "serving-peers"
"""The target of the Makefile that makes the environment of the peers."""
START_S = 90
LEAST = {"litserve": 3.0, "mlserver": 1.8}
"""The goals: requests a second over those of the peers."""


class Caller:
    """One connection, one request at a time."""

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = request
        self._answer = b""
        self._wanted: int | None = None
        self.began = 0.0

    def ask(self) -> None:
        self._answer, self._wanted = b"", None
        self.began = time.perf_counter()
        self.socket.sendall(self._request)

    def hear(self) -> bool:
        """Whether the answer is whole now."""
        part = self.socket.recv(1 << 16)
        if not part:
            sys.exit("a server closed its connection")
        self._answer += part
        if self._wanted is None and (end := self._answer.find(b"\r\n\r\n")) >= 0:
            head = self._answer[:end].lower()
            if b" 200 " not in head.split(b"\r\n")[0] + b" ":
                sys.exit(f"a server answered {self._answer[:300]!r}")
            self._wanted = end + 4 + int(head.partition(b"\r\ncontent-length:")[2].split(b"\r\n")[0])
        return self._wanted is not None and len(self._answer) >= self._wanted


def closed_loop(port: int, request: bytes, callers: int, seconds: float) -> tuple[float, list[float]]:
    """Requests a second, and milliseconds of each, with `callers` that wait for their answers."""
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        for _ in range(callers):
            caller = Caller(port, request)
            stack.callback(caller.socket.close)
            selector.register(caller.socket, selectors.EVENT_READ, caller)
            caller.ask()
        times_ms: list[float] = []
        start = now = time.perf_counter()
        while now - start < seconds:
            for key, _ in selector.select():
                if key.data.hear():
                    now = time.perf_counter()
                    times_ms.append((now - key.data.began) * 1e3)
                    key.data.ask()
        return len(times_ms) / (now - start), times_ms


def post(path: str, body: bytes, header_length: int | None = None) -> bytes:
    kind = "application/json" if header_length is None else "application/octet-stream"
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    if header_length is not None:
        lines.append(f"Inference-Header-Content-Length: {header_length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def binary(name: str, x: np.ndarray) -> bytes:
    tensor = {"name": "input", "datatype": "FP32", "shape": x.shape, "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return post(f"/v2/models/{name}/infer", head + x.tobytes(), len(head))


def as_json(name: str, x: np.ndarray) -> bytes:
    tensor = {"name": "input", "datatype": "FP32", "shape": x.shape, "data": x.reshape(-1).tolist()}
    return post(f"/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}).encode())


class Running:
    """A server, which is stopped between its turns: some servers poll even when idle."""

    def __init__(self, port: int, session: int) -> None:
        self._port = port
        self._session = session
        self._signal("STOP")

    def _signal(self, name: str) -> None:
        subprocess.run(["pkill", f"-{name}", "-s", str(self._session)], check=False)

    def go(self) -> None:
        """Let the server run on."""
        self._signal("CONT")

    def loop(self, request: bytes, callers: int, seconds: float) -> tuple[float, list[float]]:
        self._signal("CONT")
        gc.collect()
        gc.disable()  # this process holds torch: a collection of all its objects would count as the client's time
        try:
            return closed_loop(self._port, request, callers, seconds)
        finally:
            gc.enable()
            self._signal("STOP")


@contextmanager
def server(command: list[str], port: int, ready: str) -> Iterator[Running]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=2).close()
                break
            except OSError:
                if time.monotonic() > end or process.poll() is not None:
                    sys.exit(f"{' '.join(command)} did not come up")
                time.sleep(0.2)
        yield Running(port, process.pid)
    finally:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def ours(artifact: Artifact, backend: str, *options: str, port: int | None = None) -> Any:
    port = port or free_port()
    command = [
        sys.executable,
        "-m",
        "deploy",
        "serve",
        f"net={artifact.path}",
        "--backend",
        backend,
        "--http-port",
        str(port),
        "--no-grpc",
        *options,
    ]
    return server(command, port, "/v2/health/ready")


def theirs(python: Path, tool: str, artifact: Artifact) -> Any:
    port = free_port()
    ready = {"litserve": "/health", "mlserver": "/v2/health/ready"}[tool]
    return server([str(python), str(HERE / "peers" / "serve.py"), tool, str(artifact.onnx_path), str(port)], port, ready)


def resnet34(folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    for index in range(32):
        path = folder / "images" / str(index % 4) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(path)
    fp32 = deploy.export(folder / "resnet34", arch="resnet34")
    int8 = deploy.quantize(fp32, folder / "resnet34-int8", calib=folder / "images", images=32)
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    with (
        WorkerProcess(int8, "openvino", SessionOptions()) as bare,
        ours(int8, "openvino", "--max-batch", "2", "--instances", "2") as here,
    ):
        bare.wait_open()
        rates = {}
        for batch in (1, 2, 4, 8, 16, 32):
            bare.prepare({"batch": batch})
            samples = bare.round(seconds / 2, 10_000)
            rates[batch] = batch * len(samples) / sum(samples)
        best = max(rates, key=lambda batch: rates[batch])
        bare.prepare({"batch": best})

        def session() -> float:
            samples = bare.round(seconds, 10_000)
            return best * len(samples) / sum(samples)

        request = binary("net", x)
        rates_by_side = in_turns(
            {"session": session, "server": lambda: here.loop(request, 8, seconds)[0]}, rounds, warm_up=1, steady=True
        )
    ratios = [server / session for server, session in zip(rates_by_side["server"], rates_by_side["session"], strict=True)]
    return {"best_batch": best, "by_batch": rates, **rates_by_side, "ratio": statistics.median(ratios)}


def lenet5(folder: Path, peers: Path, rounds: int, seconds: float) -> dict[str, Any]:
    artifact = deploy.export(folder / "lenet5", arch="lenet5")
    x = np.random.default_rng(0).standard_normal((1, 1, 28, 28), dtype=np.float32)
    with ExitStack() as stack:
        bare = stack.enter_context(WorkerProcess(artifact, "onnxruntime", SessionOptions()))
        here = stack.enter_context(ours(artifact, "onnxruntime"))
        bare.wait_open()
        bare.prepare({"batch": 1})
        sides = {
            "session": lambda: statistics.median(bare.round(seconds / 2, 10_000)) * 1e3,
            "rest": lambda: statistics.median(here.loop(binary("net", x), 1, seconds)[1]),
        }
        p50 = in_turns(sides, rounds, warm_up=1, steady=True)
        loads: dict[str, Callable[[], float]] = {
            "deploy": lambda: here.loop(as_json("net", x), 32, seconds)[0],
            "deploy, binary": lambda: here.loop(binary("net", x), 32, seconds)[0],
        }
        for tool in ("litserve", "mlserver"):
            there = stack.enter_context(theirs(peers, tool, artifact))
            request = as_json("net", x)
            if tool == "litserve":
                request = post("/predict", json.dumps({"input": x.reshape(-1).tolist()}).encode())
            loads[tool] = lambda there=there, request=request: there.loop(request, 32, seconds)[0]  # type: ignore[misc]
        per_s = in_turns(loads, rounds, warm_up=1, steady=True)
    overheads = [rest - session for rest, session in zip(p50["rest"], p50["session"], strict=True)]
    ratios = {
        tool: statistics.median(mine / other for mine, other in zip(per_s["deploy"], per_s[tool], strict=True))
        for tool in ("litserve", "mlserver")
    }
    return {"p50_ms": p50, "overhead_ms": statistics.median(overheads), "requests_per_s": per_s, "ratios": ratios}


def bounds(folder: Path, rounds: int, seconds: float, mib: int) -> dict[str, Any]:
    large = deploy.export(folder / "most", onnx=sums(folder / "most.onnx"))
    small = deploy.export(folder / "small", arch="lenet5")
    port = free_port()
    options = ("--shared-memory", "--max-request-mb", "128", f"most={large.path}")
    with ours(small, "onnxruntime", *options, port=port) as here:
        here.go()
        per_s = shared_memory(port, rounds, seconds)
        live_ms = [max(idle_connections(port, 2000, 50)) for _ in range(rounds)]
        stalls = [large_json(port, "most", "net", folder, mib) for _ in range(rounds)]
    return {
        "requests_per_s": per_s,
        "ratio": statistics.median(mine / other for mine, other in zip(per_s["shared"], per_s["binary"], strict=True)),
        "live_ms": statistics.median(live_ms),
        "stalls": stalls,
        "stall_ms": statistics.median(each["beside_ms"] - each["alone_ms"] for each in stalls),
    }


def goals(document: Mapping[str, Any]) -> list[Goal]:
    large, small, more = document["resnet34"], document["lenet5"], document["bounds"]
    shared = {name: statistics.median(values) for name, values in more["requests_per_s"].items()}
    rates = {name: statistics.median(values) for name, values in small["requests_per_s"].items()}
    return [
        Goal(
            text=f"resnet34 INT8, OpenVINO, 8 callers: {large['ratio']:.2f} of the bare session at its best batch, {large['best_batch']}"
            f" ({statistics.median(large['server']):.0f} of {statistics.median(large['session']):.0f} images/s; goal: at least 0.9)",
            met=large["ratio"] >= 0.9,
        ),
        Goal(
            text=f"lenet5, one caller, REST binary: {small['overhead_ms']:.2f} ms over the bare session at p50 (goal: at most 0.35)",
            met=small["overhead_ms"] <= 0.35,
        ),
        *(
            Goal(
                text=f"lenet5, 32 callers, JSON: {ratio:.1f} times the requests of {tool} ({rates['deploy']:,.0f} and"
                f" {rates[tool]:,.0f} a second; goal: at least {LEAST[tool]:g})",
                met=ratio >= LEAST[tool],
            )
            for tool, ratio in small["ratios"].items()
        ),
        Goal(
            text=f"1 MiB a request, one caller: shared memory {more['ratio']:.2f} times the requests of binary REST"
            f" ({shared['shared']:,.0f} and {shared['binary']:,.0f} a second; goal: at least 1.5)",
            met=more["ratio"] >= 1.5,
        ),
        Goal(
            text=f"2,000 idle connections: liveness in {more['live_ms']:.1f} ms at the slowest (goal: under 100)",
            met=more["live_ms"] < 100,
        ),
        Goal(
            text=f"{more['stalls'][0]['mib']} MiB of JSON from one client: others wait {more['stall_ms']:.0f} ms longer at the slowest (goal: at most 50)",
            met=more["stall_ms"] <= 50,
        ),
    ]


def report(document: Mapping[str, Any]) -> str:
    binary = statistics.median(document["lenet5"]["requests_per_s"]["deploy, binary"])
    lines = [*goals(document), f"lenet5, 32 callers, binary: {binary:,.0f} a second"]
    return f"# `deploy serve`\n\n{bullets(lines)}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    add_peers(parser, MAKE)
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the first (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each side in each round (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short round, to try the script")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, 0.3
    peers = check_peers(options.peers, MAKE)
    document = {"conditions": {**conditions_here(), "rounds": options.rounds, "seconds": options.seconds}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document["lenet5"] = lenet5(folder, peers, options.rounds, options.seconds)
        document["resnet34"] = resnet34(folder, options.rounds, options.seconds)
        document["bounds"] = bounds(folder, options.rounds, options.seconds, 6 if options.quick else 60)
    publish("serving", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
