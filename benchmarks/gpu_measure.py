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
from gpu_crashes import Crashes
from gpu_jobs import not_done, outcome
from gpu_setting import Setting, source

from deploy.artifact.manifest import COMPUTE_PRECISIONS
from deploy.artifact.tensors import random_feed
from deploy.errors import BackendError
from deploy.evidence.parity import difference
from deploy.evidence.timing import Rounds, latency, paired_ratio, sample
from deploy.runtime.session import Session

SAMPLES_A_ROUND = 2000
WARM_UP = 4
"""Runs of a candidate before it is timed: it compiles, records, tunes."""

Run = Callable[[], object]


def measure(setting: Setting, model: str) -> Iterator[dict[str, Any]]:
    """The figures of a model: after each batch, all that there are so far."""
    missing = dict(lacking(setting))
    kinds = [kind for kind in (*FLAVOURS, "aoti", "onnxruntime") if kind not in missing]
    table = _Table(setting, model, candidates(model, kinds, autotune=setting.autotune), missing)
    rows: list[dict[str, Any]] = []
    with table.stack, setting.stream():
        for batch in setting.batches:
            rows.append(table.row(batch))
            yield {"model": model, "rows": rows, "engines": _engines(setting, model, table.candidates), "missing": missing}


def tried(work: Callable[[], object]) -> str | None:
    """Call `work`; why it failed, or None. What fails here is one candidate: the others go on."""
    try:
        work()
    except Exception as error:  # anything that a library raises
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return None


class _Table:
    """The rows of one model. A candidate is opened when its turn has come, after the one before it has run.

    missing: takes the reasons of those that cannot be measured.
    """

    def __init__(self, setting: Setting, model: str, found: Sequence[Candidate], missing: dict[str, str]) -> None:
        self.candidates = found
        self.stack = ExitStack()
        self._setting = setting
        self._model = model
        self._missing = missing
        self._crashes = Crashes(setting.work, model)
        self._sessions: dict[str, Session] = {}

    def row(self, batch: int) -> dict[str, Any]:
        """The figures of one batch. Raises BackendError if no eager session runs."""
        setting = self._setting
        host = random_feed(source(setting, self._model).manifest.inputs, {"batch": batch})
        feed = {name: torch.from_numpy(array).to(setting.device) for name, array in host.items()}
        ready: dict[str, Candidate] = {}
        outputs: dict[str, Mapping[str, np.ndarray]] = {}
        for candidate in self.candidates:
            label = candidate.label
            reason = self._crashes.known().get(label) or not_done(setting, candidate, self._model, batch)
            reason = reason or tried(lambda c=candidate: outputs.__setitem__(c.label, self._warm(c, feed, host)))
            if reason:
                self._missing[f"{label}, batch {batch}"] = reason
            else:
                ready[label] = candidate
        if not any(candidate.kind == "eager" for candidate in ready.values()):
            raise BackendError(f"no eager session ran at batch {batch}: {'; '.join(self._missing.values())}")
        sessions = {label: self._sessions[label] for label in ready}
        from_tensors = {label: on_device(setting, session, feed) for label, session in sessions.items()}
        from_numpy = {label: lambda s=session: s.run(host) for label, session in sessions.items()}
        expected = outputs.get("eager fp32", {})
        return {
            "batch": batch,
            "tensors": self._compared(from_tensors, ready),
            "numpy": self._compared(from_numpy, ready),
            "gpu_ms": {label: self._gpu_ms(ready[label], lambda s=sessions[label]: s.run(feed)) for label in ready},
            "parity": {label: _parity(outputs[label], expected) for label in ready},
        }

    def _warm(self, candidate: Candidate, feed: Mapping[str, Any], host: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Open a candidate if it is not open, run it until it is warm, and return its outputs of `host`."""
        setting = self._setting
        with self._crashes.watched(candidate.label):
            if candidate.label not in self._sessions:
                self._sessions[candidate.label] = self.stack.enter_context(candidate.open(setting, self._model))
            session = self._sessions[candidate.label]
            with candidate.around(setting):
                for _ in range(WARM_UP):
                    on_device(setting, session, feed)()
                    outputs = session.run(host)
        return outputs

    def _compared(self, runs: Mapping[str, Run], ready: Mapping[str, Candidate]) -> dict[str, Any]:
        """Latencies of all candidates, and how many times as fast they are as the fastest of eager."""
        setting = self._setting

        def side(label: str) -> Callable[[], list[float]]:
            def take() -> list[float]:
                with self._crashes.watched(label), ready[label].around(setting):
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

    def _gpu_ms(self, candidate: Candidate, run: Run, runs: int = 30) -> float:
        """Milliseconds of one run on the GPU, by events around many runs that are queued one after the other.

        If the CPU queues them more slowly than the GPU runs them, it is the CPU's time.
        """
        setting = self._setting
        with self._crashes.watched(candidate.label), candidate.around(setting):
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
