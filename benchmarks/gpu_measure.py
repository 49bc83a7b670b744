"""The table of one model of `gpu_report.py`: all candidates in turns, round by round, on the same input.

Each is measured from a CUDA tensor (a run and the wait for its stream) and from numpy, through pinned memory, back to numpy.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from bench_harness import in_turns
from gpu_candidates import FLAVOURS, Candidate, candidates, lacking
from gpu_jobs import not_done, outcome
from gpu_setting import Setting, source

from deploy.artifact.manifest import COMPUTE_PRECISIONS
from deploy.artifact.tensors import random_feed
from deploy.errors import BackendError
from deploy.evidence.parity import difference
from deploy.evidence.timing import Rounds, latency, paired_ratio, sample
from deploy.runtime.session import Session

SAMPLES_A_ROUND = 2000
MODES = ("tensors", "numpy")
WARM_UP = 4
"""Runs of a candidate before it is timed: it compiles, records, tunes."""

Run = Callable[[], object]


def measure(setting: Setting, model: str) -> Iterator[dict[str, Any]]:
    """The figures of a model: after each batch, all that there are so far."""
    missing = dict(lacking(setting))
    kinds = [kind for kind in (*FLAVOURS, "aoti", "onnxruntime") if kind not in missing]
    found = candidates(model, kinds, autotune=setting.autotune)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack, setting.stream():
        sessions: dict[str, Session] = {}
        for batch in setting.batches:
            ready: dict[str, Candidate] = {}
            for candidate in found:
                reason = not_done(setting, candidate, model, batch)
                if reason is None and candidate.label not in sessions:
                    reason = tried(lambda c=candidate: sessions.__setitem__(c.label, stack.enter_context(c.open(setting, model))))
                if reason is None:
                    ready[candidate.label] = candidate
                else:
                    missing[f"{candidate.label}, batch {batch}"] = reason
            rows.append(_row(setting, model, batch, ready, sessions, missing))
            yield {"model": model, "rows": rows, "engines": _engines(setting, model, found), "missing": missing}


def tried(work: Callable[[], object]) -> str | None:
    """Call `work`; why it failed, or None. What fails here is one candidate: the others go on."""
    try:
        work()
    except Exception as error:  # anything that a library raises
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return None


def _row(
    setting: Setting,
    model: str,
    batch: int,
    ready: Mapping[str, Candidate],
    sessions: Mapping[str, Session],
    missing: dict[str, str],
) -> dict[str, Any]:
    host = random_feed(source(setting, model).manifest.inputs, {"batch": batch})
    feed = {name: torch.from_numpy(array).to(setting.device) for name, array in host.items()}
    runs: dict[str, dict[str, Run]] = {mode: {} for mode in MODES}
    outputs: dict[str, Mapping[str, np.ndarray]] = {}
    for label, candidate in ready.items():
        both = {"tensors": on_device(setting, sessions[label], feed), "numpy": lambda s=sessions[label]: s.run(host)}

        def warm(label: str = label, candidate: Candidate = candidate, both: Mapping[str, Run] = both) -> None:
            with candidate.around(setting):
                for _ in range(WARM_UP):
                    both["tensors"]()
                    outputs[label] = both["numpy"]()  # type: ignore[assignment]

        if reason := tried(warm):
            missing[f"{label}, batch {batch}"] = reason
            continue
        for mode in MODES:
            runs[mode][label] = both[mode]
    if not any(ready[label].kind == "eager" for label in outputs):
        raise BackendError(f"no eager session ran at batch {batch}: {'; '.join(missing.values())}")
    figures = {mode: _compared(setting, runs[mode], ready) for mode in MODES}
    gpu_ms = {label: _gpu_ms(setting, ready[label], lambda s=sessions[label]: s.run(feed)) for label in outputs}
    expected = outputs.get("eager fp32", {})
    return {
        "batch": batch,
        **figures,
        "gpu_ms": gpu_ms,
        "parity": {label: _parity(each, expected) for label, each in outputs.items()},
    }


def _compared(setting: Setting, runs: Mapping[str, Run], ready: Mapping[str, Candidate]) -> dict[str, Any]:
    """Latencies of all candidates, and how many times as fast they are as the fastest of eager."""

    def side(label: str) -> Callable[[], list[float]]:
        def take() -> list[float]:
            with ready[label].around(setting):
                return sample(runs[label], setting.slice_s, SAMPLES_A_ROUND)

        return take

    rounds = in_turns({label: side(label) for label in runs}, setting.rounds, warm_up=1)
    latencies = {label: latency_ms(samples) for label, samples in rounds.items()}
    strongest = min((label for label in rounds if ready[label].kind == "eager"), key=lambda label: latencies[label]["p50"])
    return {
        "baseline": strongest,
        "latency_ms": latencies,
        "speedup": {label: ratio(rounds[strongest], samples) for label, samples in rounds.items() if label != strongest},
        "samples_ms": {
            label: [[round(value * 1e3, 5) for value in part] for part in samples] for label, samples in rounds.items()
        },
    }


def _parity(result: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float] | None:
    """Of the outputs to those of eager in FP32 without TF32; None without those."""
    if not expected:
        return None
    off = [difference(result[name], expected[name]) for name in expected]
    return {"max_abs": max(each.max_abs for each in off), "cosine": min(each.cosine for each in off)}


def _engines(setting: Setting, model: str, found: Sequence[Candidate]) -> dict[str, Any]:
    """What was built for the candidates: the time that it took, its size, and how an engine divides its multiply-accumulates."""
    built = {}
    for candidate in found:
        if setting.dry or candidate.kind not in (*FLAVOURS, "aoti") or "CUDA graph" in candidate.label:
            continue
        (name,) = candidate.jobs(model, 1)
        done = outcome(setting, name)
        if done is None or "error" in done:
            continue
        artifact = candidate.artifact(setting, model)
        share = artifact.manifest.precision_share
        built[candidate.label] = {
            "seconds": done.get("build_s") or done["seconds"],
            "bytes": artifact.size,
            "share": {kind: getattr(share, kind) for kind in COMPUTE_PRECISIONS}
            | {"from": share.origin, "coverage": share.coverage}
            if share
            else None,
        }
    return built


def on_device(setting: Setting, session: Session, feed: Mapping[str, Any]) -> Run:
    """A run on tensors, and the wait for the current stream."""

    def run() -> None:
        session.run(feed)
        setting.wait()

    return run


def latency_ms(rounds: Rounds) -> dict[str, float]:
    times = latency([value * 1e3 for part in rounds for value in part])
    return {"p50": times.p50, "p90": times.p90, "p99": times.p99}


def ratio(baseline: Rounds, candidate: Rounds) -> dict[str, float]:
    found = paired_ratio(baseline, candidate)
    return {"value": found.value, "low": found.low, "high": found.high}


def _gpu_ms(setting: Setting, candidate: Candidate, run: Run, runs: int = 30) -> float:
    """Milliseconds of one run on the GPU, by events around many runs that are queued one after the other.

    If the CPU queues them more slowly than the GPU runs them, it is the CPU's time.
    """
    with candidate.around(setting):
        if setting.dry:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        setting.wait()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(runs):
            run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / runs
