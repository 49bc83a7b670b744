"""The parts of `gpu_report.py`: engines of the reference architectures against PyTorch on the same GPU.

The candidates of a table are paired: they take turns, round by round, on the same input.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_harness import in_turns

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import COMPUTE_PRECISIONS
from deploy.artifact.tensors import random_feed
from deploy.engine.flavour import load_flavour
from deploy.errors import BackendError
from deploy.evidence.parity import difference
from deploy.evidence.timing import Rounds, latency, paired_ratio, sample
from deploy.runtime.load import open_session
from deploy.runtime.session import Session, SessionOptions

MODELS = ("lenet5", "resnet34", "resnet50", "mobilenet_v1")
PRECISIONS = ("fp32", "fp16", "int8")
BATCHES = (1, 8, 32, 128)
CONTEXTS = (1, 2, 3, 4)
CALIBRATION_ROWS = 64
SAMPLES_A_ROUND = 5000

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how long to measure. `dry`: on the CPU, with ONNX Runtime in place of the engine, to test the script itself."""

    work: Path
    flavour: str = "auto"
    dry: bool = False
    batches: Sequence[int] = BATCHES
    rounds: int = 9
    slice_s: float = 0.15
    throughput_s: float = 0.5

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def open(self, artifact: Artifact, backend: str, contexts: int = 1) -> Session:
        """A session. For an engine, `backend` is the variant after its flavour; on the CPU its typed ONNX file runs instead."""
        target = artifact.manifest.target
        if target is None:
            return open_session(artifact, backend, SessionOptions(device=self.device if "onnxruntime" not in backend else "auto"))
        if self.dry:
            return open_session(deploy.open_artifact(artifact.onnx_path), "onnxruntime")
        return open_session(artifact, target.flavour + backend, SessionOptions(contexts=contexts))


def parts() -> dict[str, Callable[[Setting], dict[str, Any]]]:
    """The parts by name, in the order in which they are measured."""
    named: dict[str, Callable[[Setting], dict[str, Any]]] = {"overhead": overhead}
    for name in MODELS:
        for precision in PRECISIONS:
            named[f"{name}-{precision}"] = _bound(name, precision)
    named["resnet50-autotune"] = autotune
    return named


def _bound(name: str, precision: str) -> Callable[[Setting], dict[str, Any]]:
    return lambda setting: measure(setting, name, precision)


def measure(setting: Setting, name: str, precision: str) -> dict[str, Any]:
    """Build time, precision share, parity, latency, throughput and speed-ups of one engine."""
    source = _exported(setting, name)
    engine, seconds = _built(setting, source, precision)
    half = precision != "fp32"
    with ExitStack() as stack:
        baselines = {"eager fp32": "eager", "eager fp16 channels_last": "eager:fp16,channels_last"}
        baselines["compile"] = "compile:fp16,channels_last" if half else "compile"
        sessions = {label: stack.enter_context(setting.open(source, backend)) for label, backend in baselines.items()}
        missing = {}
        try:
            plain = source if not half else _converted(setting, source)
            sessions["onnxruntime:cuda"] = stack.enter_context(
                setting.open(plain, "onnxruntime" if setting.dry else "onnxruntime:cuda")
            )
        except BackendError as error:
            missing["onnxruntime:cuda"] = str(error)
        sessions["engine"] = stack.enter_context(setting.open(engine, ""))
        sessions["engine, CUDA graph"] = stack.enter_context(setting.open(engine, ":cuda_graph"))
        rows = [_row(setting, sessions, batch) for batch in setting.batches]
    for row in rows:
        row["throughput"] = _throughput(setting, engine, row["batch"])
    share = engine.manifest.precision_share
    assert share is not None
    return {
        "model": name,
        "precision": precision,
        "flavour": engine.manifest.target and f"{engine.manifest.target.flavour} {engine.manifest.target.version}",
        "build_s": seconds,
        "engine_bytes": engine.size,
        "share": {kind: getattr(share, kind) for kind in COMPUTE_PRECISIONS} | {"from": share.origin, "coverage": share.coverage},
        "share_of_time": share.time,
        "missing": missing,
        "rows": rows,
    }


def _row(setting: Setting, sessions: Mapping[str, Session], batch: int) -> dict[str, Any]:
    engine = sessions["engine"]
    host = random_feed(engine.inputs, {"batch": batch})
    feed = {name: torch.from_numpy(array).to(setting.device) for name, array in host.items()}
    runs: dict[str, Run] = {label: _on_device(setting, session, feed) for label, session in sessions.items()}
    runs["engine from numpy"] = lambda: engine.run(host)
    rounds = _alternate(setting, runs)
    expected = sessions["eager fp32"].run(feed)
    result = engine.run(feed)
    off = [difference(result[name].cpu().numpy(), expected[name].cpu().numpy()) for name in expected]
    return {
        "batch": batch,
        "latency_ms": {label: _latency(samples) for label, samples in rounds.items()},
        "gpu_ms": {label: _gpu_ms(setting, lambda s=session: s.run(feed)) for label, session in sessions.items()},
        "speedup": {
            label: {other: _ratio(rounds[other], rounds[label]) for other in rounds if other not in ("engine", label)}
            for label in ("engine", "engine, CUDA graph")
        },
        "parity": {"max_abs": max(each.max_abs for each in off), "cosine": min(each.cosine for each in off)},
        "samples_ms": {
            label: [[round(value * 1e3, 5) for value in part] for part in samples] for label, samples in rounds.items()
        },
    }


def overhead(setting: Setting) -> dict[str, Any]:
    """What the session adds to the bare engine, on CUDA tensors and from numpy, in FP16."""
    overheads: dict[str, Any] = {}
    for name, batch in (("resnet50", 8), ("lenet5", 1)):
        engine, _ = _built(setting, _exported(setting, name), "fp16")
        with setting.open(engine, "") as session, setting.open(engine, ":cuda_graph") as graphs:
            host = random_feed(session.inputs, {"batch": batch})
            feed = {key: torch.from_numpy(array).to(setting.device) for key, array in host.items()}
            bare = _bare(setting, engine, feed, session)
            copies = _copies(setting, host, session.run(feed))
            runs = {
                "session": _on_device(setting, session, feed),
                "bare": bare.run,
                "session, CUDA graph": _on_device(setting, graphs, feed),
                "bare, CUDA graph": bare.replay,
                "session from numpy": lambda s=session, x=host: s.run(x),
                "copies": copies,
            }
            rounds = _alternate(setting, runs)
        medians = {label: _latency(samples)["p50"] for label, samples in rounds.items()}
        overheads[f"{name}, batch {batch}"] = {
            "p50_ms": medians,
            "session_over_bare": _ratio(rounds["session"], rounds["bare"]),
            "session_more_us": (medians["session"] - medians["bare"]) * 1e3,
            "graph_more_us": (medians["session, CUDA graph"] - medians["bare, CUDA graph"]) * 1e3,
            "numpy_over_copy_and_compute": medians["session from numpy"] / (medians["copies"] + medians["bare"]),
        }
    return {"overhead": overheads}


def autotune(setting: Setting) -> dict[str, Any]:
    """resnet50 in FP16 against torch.compile at its most thorough."""
    source = _exported(setting, "resnet50")
    engine, _ = _built(setting, source, "fp16")
    rows = []
    with (
        setting.open(source, "compile:max-autotune,fp16,channels_last") as compiled,
        setting.open(engine, ":cuda_graph") as session,
    ):
        for batch in (1, 8):
            feed = {
                key: torch.from_numpy(x).to(setting.device) for key, x in random_feed(session.inputs, {"batch": batch}).items()
            }
            runs = {"engine": _on_device(setting, session, feed), "compile": _on_device(setting, compiled, feed)}
            rounds = _alternate(setting, runs)
            latencies = {label: _latency(samples) for label, samples in rounds.items()}
            rows.append({"batch": batch, "latency_ms": latencies, "speedup": _ratio(rounds["compile"], rounds["engine"])})
    return {"autotune": rows}


def _exported(setting: Setting, name: str) -> Artifact:
    return deploy.export(setting.work / name, arch=name)


def _converted(setting: Setting, source: Artifact) -> Artifact:
    return deploy.convert(source, setting.work / f"{source.manifest.name}-fp16", precision="fp16")


def _built(setting: Setting, source: Artifact, precision: str) -> tuple[Artifact, float | None]:
    """The engine, and the seconds that parsing and building took; None when it existed already.

    One profile for single images and one for batches. Calibrated on random input: for time, not for accuracy.
    """
    (spec,) = source.manifest.inputs
    rest = "x".join(str(dim) for dim in spec.shape[1:])
    most = max(*setting.batches, 2)
    shapes = [f"{spec.name}=1x{rest}", f"{spec.name}=2x{rest}:{max(2, most // 4)}x{rest}:{most}x{rest}"]
    phases: list[tuple[str, float]] = []
    calibration = [random_feed([spec], {"batch": 8}, seed=seed) for seed in range(CALIBRATION_ROWS // 8)]
    engine = deploy.build_trt(
        source,
        setting.work / f"{source.manifest.name}-{precision}-trt",
        precision=None if precision == "fp32" else "fp16",
        int8=precision == "int8",
        calib=calibration if precision == "int8" else None,
        allow_slower=precision == "int8",
        flavour=setting.flavour,
        shapes=shapes,
        cache=False,
        progress=lambda phase, *_: phases.append((phase, time.perf_counter())),
    )
    if not phases:
        return engine, None
    start = next(at for phase, at in phases if phase == "parsing")
    end = next((at for phase, at in phases if phase == "attesting the engine"), phases[-1][1])
    return engine, end - start


def _on_device(setting: Setting, session: Session, feed: Mapping[str, Any]) -> Run:
    def run() -> None:
        session.run(feed)
        setting.wait()

    return run


def _alternate(setting: Setting, runs: Mapping[str, Run]) -> dict[str, list[list[float]]]:
    """Seconds of every candidate, round by round, after a warm-up."""
    for run in runs.values():
        for _ in range(3):  # compiles, captures, tunes
            run()
        sample(run, setting.slice_s)
    sides = {label: partial(sample, run, setting.slice_s, SAMPLES_A_ROUND) for label, run in runs.items()}
    return in_turns(sides, setting.rounds)


def _latency(rounds: Rounds) -> dict[str, float]:
    times = latency([value * 1e3 for part in rounds for value in part])
    return {"p50": times.p50, "p90": times.p90, "p99": times.p99}


def _ratio(baseline: Rounds, candidate: Rounds) -> dict[str, float]:
    ratio = paired_ratio(baseline, candidate)
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high}


def _gpu_ms(setting: Setting, run: Run, runs: int = 50) -> float:
    """Milliseconds of one run on the GPU, by events around many runs that are queued one after the other.

    If the CPU queues them more slowly than the GPU runs them, it is the CPU's time.
    """
    setting.wait()
    if setting.dry:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(runs):
        run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / runs


def _throughput(setting: Setting, engine: Artifact, batch: int) -> dict[str, float]:
    """Images per second by the number of contexts; each context has its own thread and stream."""
    rates = {}
    for contexts in CONTEXTS:
        with setting.open(engine, "", contexts) as session:
            rates[str(contexts)] = _images_per_s(setting, session, batch, contexts)
    return rates


def _images_per_s(setting: Setting, session: Session, batch: int, threads: int) -> float:
    feed = {key: torch.from_numpy(x).to(setting.device) for key, x in random_feed(session.inputs, {"batch": batch}).items()}
    session.run(feed)
    setting.wait()
    counts = [0] * threads
    gate = threading.Barrier(threads + 1)
    over = threading.Event()

    def work(index: int) -> None:
        gate.wait()
        with ExitStack() as stack:
            if not setting.dry:
                stream = torch.cuda.Stream()
                stack.enter_context(torch.cuda.stream(stream))
            while not over.is_set():
                session.run(feed)
                if not setting.dry:
                    stream.synchronize()
                counts[index] += 1

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    gate.wait()
    start = time.perf_counter()
    time.sleep(setting.throughput_s)
    over.set()
    for worker in workers:
        worker.join()
    return sum(counts) * batch / (time.perf_counter() - start)


def _copies(setting: Setting, host: Mapping[str, np.ndarray], outputs: Mapping[str, torch.Tensor]) -> Run:
    """Copies the numpy arrays to the GPU, and outputs of the same size back into numpy arrays."""
    inputs = [torch.from_numpy(array) for array in host.values()]
    there = [x.to(setting.device) for x in inputs]

    def run() -> None:
        for to, x in zip(there, inputs, strict=True):
            to.copy_(x)
        for output in outputs.values():
            output.cpu().numpy()
        setting.wait()

    return run


@dataclass(frozen=True, kw_only=True)
class _Bare:
    run: Run
    replay: Run


def _bare(setting: Setting, engine: Artifact, feed: Mapping[str, torch.Tensor], session: Session) -> _Bare:
    """The engine without a session: `execute_async_v3` in a loop, and replays of a CUDA graph of it.

    On the CPU, which runs no engine, the session itself.
    """
    if setting.dry:
        return _Bare(run=lambda: session.run(feed), replay=lambda: session.run(feed))
    assert engine.manifest.target is not None
    trt: Any = load_flavour(engine.manifest.target.flavour).trt
    logger = trt.Logger(trt.Logger.ERROR)
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine.payload.read_bytes())
    context = loaded.create_execution_context()
    stream = torch.cuda.Stream()
    batch = len(next(iter(feed.values())))
    context.set_optimization_profile_async(0 if batch == 1 else 1, stream.cuda_stream)
    results = {name: torch.empty_like(value) for name, value in session.run(feed).items()}
    for name, tensor in feed.items():
        context.set_input_shape(name, tuple(tensor.shape))
    for name, tensor in {**feed, **results}.items():
        context.set_tensor_address(name, tensor.data_ptr())

    def run() -> None:
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        context.execute_async_v3(stream.cuda_stream)

    def replay() -> None:
        graph.replay()
        setting.wait()

    run.owners = (logger, loaded, context, results)  # type: ignore[attr-defined]  # TensorRT's objects do not keep one another alive
    return _Bare(run=run, replay=replay)
