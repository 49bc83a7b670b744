"""The rounds of a benchmark: all candidates in turns, and the rows that come of their samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np

from deploy.bench.plan import Candidate
from deploy.bench.rows import BenchRow, verdict_of
from deploy.bench.workers import Workers
from deploy.evidence.parity import difference
from deploy.evidence.timing import latency, paired_ratio
from deploy.host.nvidia_smi import gpu_watched
from deploy.runtime.catalog import recorded_accuracy
from deploy.runtime.profiling import DeviceTimes

ROUNDS = 15
MIN_ROUNDS = 5
SAMPLES_A_ROUND = 500

Samples = dict[Candidate, list[list[float]]]
"""Seconds of every run, by candidate and round."""


class Run:
    """The rounds of one benchmark.

    rows: what has been measured. inputs: by batch size, how many inputs and of how many bytes. gpu: its states during the rounds.
    """

    def __init__(self, workers: Workers, folder: Path) -> None:
        self.rows: list[BenchRow] = []
        self.inputs: dict[str, dict[str, int]] = {}
        self.gpu: list[dict[str, str]] = []
        self._workers = workers
        self._folder = folder
        self._first_s: dict[Candidate, float] = {}

    def measure(self, batch: int, seconds: float) -> None:
        """Measure all candidates that take this batch size, in turns, for `seconds`. Ctrl-C keeps whole rounds, if enough."""
        run_s = self._warm_up(batch)
        errors = self._errors(list(run_s))
        samples: Samples = {candidate: [] for candidate in self._workers.still(list(run_s))}
        device = next((candidate.device for candidate in samples if candidate.device != "cpu"), None)
        try:
            with gpu_watched(device, self.gpu):
                self._take_turns(batch, seconds, run_s, samples)
        except KeyboardInterrupt:
            whole = min(len(samples[candidate]) for candidate in self._workers.still(list(samples)))
            if whole >= MIN_ROUNDS:  # fewer prove nothing
                self._add_rows(batch, {candidate: series[:whole] for candidate, series in samples.items()}, errors, {}, {})
            raise
        memory = {
            candidate: self._workers.ask(candidate, lambda process: process.memory())
            for candidate in self._workers.still(list(samples))
        }
        on_gpu = [candidate for candidate in self._workers.still(list(samples)) if candidate.device != "cpu"]
        times = {candidate: self._workers.ask(candidate, lambda process: process.device_times()) for candidate in on_gpu}
        self._add_rows(batch, samples, errors, memory, times)

    def _warm_up(self, batch: int) -> dict[Candidate, float]:
        """Seconds of a run of each candidate once its times have settled; outputs are written for `_errors`."""
        run_s: dict[Candidate, float] = {}
        for candidate in self._workers.running(batch):
            prepared = self._workers.prepare(candidate, batch, f"batch {batch}: warm up", self._outputs(candidate))
            if prepared is not None:
                run_s[candidate] = prepared.run_s
                self._first_s.setdefault(candidate, prepared.first_s)
                self.inputs[str(batch)] = {"inputs": prepared.inputs, "bytes": prepared.input_bytes}
        return run_s

    def _take_turns(self, batch: int, seconds: float, run_s: Mapping[Candidate, float], samples: Samples) -> None:
        """Fill `samples`, round by round, in an order that rotates."""
        slice_s = seconds / (ROUNDS * len(samples))
        rounds = int(seconds / sum(max(run_s[candidate], slice_s) for candidate in samples) + 0.5)
        rounds = min(max(rounds, MIN_ROUNDS), ROUNDS)
        for turn in range(rounds):
            self._workers.progress(f"batch {batch}", turn, rounds)
            running = self._workers.still(list(samples))
            shift = turn % len(running)
            for candidate in running[shift:] + running[:shift]:
                taken_s = self._workers.ask(candidate, lambda process: process.round(slice_s, SAMPLES_A_ROUND))
                if taken_s is not None:
                    samples[candidate].append(taken_s)

    def _add_rows(
        self,
        batch: int,
        samples: Samples,
        errors: Mapping[Candidate, float | None],
        memory: Mapping[Candidate, tuple[int, int | None] | None],
        device: Mapping[Candidate, DeviceTimes | None],
    ) -> None:
        baseline = self._workers.baseline
        for candidate in self._workers.still(list(samples)):
            host, gpu = memory.get(candidate) or (0, None)
            row = _row(candidate, batch, samples[candidate], samples[baseline], is_baseline=candidate is baseline)
            self.rows.append(
                replace(
                    row,
                    max_abs_error=errors[candidate],
                    first_ms=self._first_s[candidate] * 1e3,
                    load_s=self._workers.load_s[candidate],
                    peak_bytes=host,
                    gpu_bytes=gpu,
                    **(asdict(times) if (times := device.get(candidate)) is not None else {}),
                )
            )

    def _outputs(self, candidate: Candidate) -> Path:
        return self._folder / f"{id(candidate)}.npz"

    def _errors(self, candidates: Sequence[Candidate]) -> dict[Candidate, float | None]:
        """The largest difference of each candidate's outputs to the baseline's; the files are removed."""
        with np.load(self._outputs(self._workers.baseline)) as expected:
            reference = list(expected.values())
        errors: dict[Candidate, float | None] = {}
        for candidate in candidates:
            path = self._outputs(candidate)
            with np.load(path) as file:
                outputs = list(file.values())
            path.unlink()
            if [x.shape for x in outputs] != [x.shape for x in reference]:
                self._workers.fail(candidate, "its outputs have other shapes than those of the baseline")
                continue
            largest = max(difference(x, wanted).max_abs for x, wanted in zip(outputs, reference, strict=True))
            errors[candidate] = largest if math.isfinite(largest) else None
        return errors


def _row(
    candidate: Candidate, batch: int, series: list[list[float]], baseline: list[list[float]], *, is_baseline: bool
) -> BenchRow:
    """The figures of the samples; the caller fills in the rest."""
    samples_ms = [value * 1e3 for value in chain.from_iterable(series)]
    times = latency(samples_ms)
    speed = paired_ratio(baseline, series)
    accuracy = recorded_accuracy(candidate.artifact, candidate.backend)
    return BenchRow(
        **candidate.named,
        batch=batch,
        p50_ms=times.p50,
        p90_ms=times.p90,
        p99_ms=times.p99,
        p999_ms=times.p999,
        mean_ms=times.mean,
        images_per_s=batch / times.mean * 1e3,
        speedup=speed.value,
        speedup_low=speed.low,
        speedup_high=speed.high,
        verdict="baseline" if is_baseline else verdict_of(speed),
        max_abs_error=None,
        first_ms=0.0,
        load_s=0.0,
        peak_bytes=0,
        gpu_bytes=None,
        size_bytes=candidate.artifact.size,
        top1=accuracy.top1 if accuracy else None,
        top5=accuracy.top5 if accuracy else None,
        accuracy_from="manifest" if accuracy else None,
        score=msgspec.to_builtins(accuracy.judged) if accuracy else None,
        gflops=None,
        roof_gflops=None,
        gpu_ms=None,
        h2d_ms=None,
        d2h_ms=None,
        samples_ms=tuple(round(value, 6) for value in samples_ms),
        rounds=tuple(len(part) for part in series),
    )
