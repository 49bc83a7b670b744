"""Two more parts of `gpu_report.py`: what a session adds to what it runs, and several execution contexts of an engine."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench_harness import in_turns
from gpu_candidates import AOTI, EAGER, FLAVOURS, Candidate, engines, lacking
from gpu_crashes import Crashes
from gpu_jobs import not_done
from gpu_measure import SAMPLES_A_ROUND, WARM_UP, Run, latency_ms, on_device, ratio, tried
from gpu_setting import Setting, opened

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import random_feed
from deploy.engine.flavour import load_flavour
from deploy.evidence.timing import sample
from deploy.runtime.session import Session

CONTEXTS = (1, 2, 3, 4)
SMALL, LARGE = ("lenet5", 1), ("resnet50", 8)
"""The models and batch sizes of the part `overhead`: one whose kernels take next to no time, and one with the usual load."""


def overhead_candidates(kinds: Sequence[str]) -> list[Candidate]:
    """FP32 eager and AOTInductor, and FP16 engines: those whose bare form takes and returns what the session does."""
    found = [EAGER[0]]
    for kind in kinds:
        if kind == "aoti":
            found += [each for each in AOTI if each.precision == "fp32"]
        elif kind in FLAVOURS:
            found += engines(kind, ("fp16",))
    return found


def overhead(setting: Setting) -> Iterator[dict[str, Any]]:
    """What a session adds to the bare module, package or engine, on CUDA tensors and from numpy: so far, after each model."""
    missing = dict(lacking(setting))
    crashes = Crashes(setting.work, "overhead")
    rows: list[dict[str, Any]] = []
    for model, batch in (SMALL,) if setting.dry else (SMALL, LARGE):
        for candidate in overhead_candidates([kind for kind in ("aoti", *FLAVOURS) if kind not in missing]):
            label = f"{candidate.label}, {model}"
            reason = crashes.known().get(label) or not_done(setting, candidate, model, batch)
            with crashes.watched(label):
                reason = reason or tried(
                    lambda c=candidate, m=model, b=batch: rows.append(
                        {"model": m, "batch": b, "label": c.label, **_added(setting, c, m, b)}
                    )
                )
            if reason:
                missing[label] = reason
        yield {"overhead": rows, "missing": missing}


def _added(setting: Setting, candidate: Candidate, model: str, batch: int) -> dict[str, Any]:
    with candidate.open(setting, model) as session, setting.stream():
        host = random_feed(session.inputs, {"batch": batch})
        feed = {name: torch.from_numpy(array).to(setting.device) for name, array in host.items()}
        bare = _bare(setting, candidate, model, session, feed)
        runs: dict[str, Run] = {
            "session": on_device(setting, session, feed),
            "bare": bare,
            "session from numpy": lambda: session.run(host),
            "copies": _copies(setting, host, session.run(feed)),
        }
        for run in runs.values():
            for _ in range(WARM_UP):
                run()
        sides = {label: (lambda run=run: sample(run, setting.slice_s, SAMPLES_A_ROUND)) for label, run in runs.items()}
        rounds = in_turns(sides, setting.rounds, warm_up=1)
    p50 = {label: latency_ms(samples)["p50"] for label, samples in rounds.items()}
    return {
        "p50_ms": p50,
        "session_over_bare": ratio(rounds["session"], rounds["bare"]),
        "own_us": (p50["session"] - p50["bare"]) * 1e3,
        "numpy_over_copy_and_compute": p50["session from numpy"] / (p50["copies"] + p50["bare"]),
    }


def _bare(setting: Setting, candidate: Candidate, model: str, session: Session, feed: Mapping[str, torch.Tensor]) -> Run:
    """What the session runs, without the session, and the wait for the current stream. In a dry run, the session itself."""
    inputs = list(feed.values())
    if setting.dry:
        return lambda: session.run(feed)
    artifact = candidate.artifact(setting, model)
    if candidate.kind in FLAVOURS:
        engine = _engine(artifact, feed, session)
        return engine.replay if "CUDA graph" in candidate.label else engine.run
    if candidate.kind == "aoti":
        runner: Any = torch._inductor.aoti_load_package(str(artifact.payload)).loader

        def call() -> object:
            return runner.boxed_run(list(inputs))
    else:
        module = session._plain  # type: ignore[attr-defined]

        def call() -> object:
            with torch.inference_mode():
                return module(*inputs)

    def run() -> None:
        call()
        setting.wait()

    return run


def _copies(setting: Setting, host: Mapping[str, np.ndarray], outputs: Mapping[str, torch.Tensor]) -> Run:
    """Copies the numpy arrays to the GPU through pinned memory, and outputs of the same size back into numpy arrays."""
    inputs = [torch.from_numpy(array) for array in host.values()]
    pin = not setting.dry
    there = [x.to(setting.device) for x in inputs]
    staged = [torch.empty(x.shape, dtype=x.dtype, pin_memory=pin) for x in inputs]
    back = [torch.empty(x.shape, dtype=x.dtype, pin_memory=pin) for x in outputs.values()]

    def run() -> None:
        for to, middle, x in zip(there, staged, inputs, strict=True):
            to.copy_(middle.copy_(x), non_blocking=True)
        for middle, x in zip(back, outputs.values(), strict=True):
            middle.copy_(x, non_blocking=True)
        setting.wait()
        for middle in back:
            middle.numpy().copy()

    return run


@dataclass(frozen=True, kw_only=True)
class _Engine:
    run: Run
    replay: Run


def _engine(artifact: Artifact, feed: Mapping[str, torch.Tensor], session: Session) -> _Engine:
    """The engine without a session: `execute_async_v3` on the current stream, and replays of a CUDA graph of it."""
    assert artifact.manifest.target is not None
    trt: Any = load_flavour(artifact.manifest.target.flavour).trt
    logger = trt.Logger(trt.Logger.ERROR)
    loaded = trt.Runtime(logger).deserialize_cuda_engine(artifact.payload.read_bytes())
    context = loaded.create_execution_context()
    stream = torch.cuda.current_stream()
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
        stream.synchronize()

    run.owners = (logger, loaded, context, results)  # type: ignore[attr-defined]  # TensorRT's objects do not keep one another alive
    replay.owners = run  # type: ignore[attr-defined]
    return _Engine(run=run, replay=replay)


def contexts(setting: Setting) -> Iterator[dict[str, Any]]:
    """Images a second of FP16 engines by the number of execution contexts; each has a thread and a stream of its own."""
    model = SMALL[0] if setting.dry else LARGE[0]
    missing = dict(lacking(setting))
    crashes = Crashes(setting.work, "contexts")
    rows: list[dict[str, Any]] = []
    for flavour in FLAVOURS:
        if flavour in missing:
            continue
        candidate = engines(flavour, ("fp16",))[0]
        for batch in setting.batches:
            label = f"{candidate.label}, batch {batch}"
            reason = crashes.known().get(label) or not_done(setting, candidate, model, batch)
            with crashes.watched(label):
                reason = reason or tried(
                    lambda c=candidate, b=batch: rows.append(
                        {"model": model, "label": c.label, "batch": b, "images_per_s": _rates(setting, c, model, b)}
                    )
                )
            if reason:
                missing[label] = reason
    yield {"contexts": rows, "missing": missing}


def _rates(setting: Setting, candidate: Candidate, model: str, batch: int) -> dict[str, float]:
    """Images a second by the number of contexts."""
    rates = {}
    for count in CONTEXTS:
        with opened(setting, candidate.artifact(setting, model), candidate.backend, count) as session:
            rates[str(count)] = _images_per_s(setting, session, batch, count)
    return rates


def _images_per_s(setting: Setting, session: Session, batch: int, threads: int) -> float:
    feed = {name: torch.from_numpy(x).to(setting.device) for name, x in random_feed(session.inputs, {"batch": batch}).items()}
    session.run(feed)
    setting.wait()
    gate = threading.Barrier(threads + 1)
    over = threading.Event()

    def work() -> int:
        gate.wait()
        count = 0
        with setting.stream():
            while not over.is_set():
                session.run(feed)
                setting.wait()
                count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        counts = [pool.submit(work) for _ in range(threads)]
        gate.wait()
        start = time.perf_counter()
        time.sleep(setting.throughput_s)
        over.set()
        return sum(count.result() for count in counts) * batch / (time.perf_counter() - start)
