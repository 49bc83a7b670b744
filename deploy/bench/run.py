"""One benchmark under way: its workers, what they are asked in which order, and what they have found so far."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np

from deploy.artifact.tensors import rows_join
from deploy.bench.candidate.loadgen import Judged, Scenario
from deploy.bench.candidate.process import CandidateProcess
from deploy.bench.candidate.traffic import Load
from deploy.bench.plan import Candidate, Plan, Skipped
from deploy.bench.rows import BenchRow, LayersRow, LoadRow, ScenarioRow, verdict_of
from deploy.errors import BackendError, WorkerDiedError
from deploy.evidence.parity import difference
from deploy.evidence.timing import latency, paired_ratio
from deploy.progress import Progress
from deploy.runtime.profiling import DeviceTimes
from deploy.runtime.session import SessionOptions
from deploy.runtime.worker.process import Prepared

ROUNDS = 15
MIN_ROUNDS = 5
SAMPLES_A_ROUND = 500
SERVER_RUNS = 10
"""Of the scenario `server`: runs of the baseline that a query may take unless a limit is given."""

T = TypeVar("T")


class Run:
    """The workers of one benchmark and what they have found so far."""

    def __init__(
        self, plan: Plan, options: SessionOptions, data: Path | None, stack: ExitStack, folder: Path, progress: Progress
    ) -> None:
        self.rows: list[BenchRow] = []
        self.loads: list[LoadRow] = []
        self.scenarios: list[ScenarioRow] = []
        self.layers: list[LayersRow] = []
        self.inputs: dict[str, dict[str, int]] = {}
        self._data = data
        self._load_s: dict[Candidate, float] = {}
        self._first_s: dict[Candidate, float] = {}
        self.skipped: list[Skipped] = []
        self.failures: list[Skipped] = []
        everyone = self.candidates = (plan.baseline, *plan.candidates)
        self._baseline = plan.baseline
        self._folder = folder
        self._progress = progress
        progress("start", 0, len(everyone))
        self._workers = {
            candidate: stack.enter_context(
                CandidateProcess(candidate.artifact, candidate.backend, replace(options, device=candidate.device))
            )
            for candidate in everyone
        }

    def open(self, *, named_artifacts: bool, named_backends: bool) -> None:
        """Wait for all sessions. Candidates that cannot run here are skipped, or, when they were named, raised."""
        for done, (candidate, worker) in enumerate(list(self._workers.items())):
            self._progress(f"open {worker.label}", done, len(self._workers))
            try:
                self._load_s[candidate] = worker.wait_open()
            except BackendError as error:
                died = isinstance(error, WorkerDiedError)
                if candidate is self._baseline or (named_backends and not died):
                    raise
                self._drop(candidate, str(error), self.failures if died else self.skipped)
        if named_artifacts:
            running = {candidate.artifact.shown for candidate in self._workers if candidate is not self._baseline}
            for entry in self.skipped:
                if entry.artifact not in running:
                    raise BackendError(f"no backend can run {entry.artifact} here: {entry.backend}: {entry.reason}")

    def measure(self, batch: int, seconds: float) -> None:
        """Measure all candidates that take this batch size, in turns, for `seconds`."""
        run_s: dict[Candidate, float] = {}
        for candidate in [each for each in self._workers if batch in each.batches]:
            self._progress(f"batch {batch}: warm up {self._workers[candidate].label}")
            taken = self._ask(candidate, partial(self._prepare, candidate.sizes(batch)))
            if taken is not None:
                run_s[candidate] = taken.run_s
                self._first_s.setdefault(candidate, taken.first_s)
                self.inputs[str(batch)] = {"inputs": taken.inputs, "bytes": taken.input_bytes}
        errors = self._errors(list(run_s))
        run_s = {candidate: taken for candidate, taken in run_s.items() if candidate in self._workers}
        slice_s = seconds / (ROUNDS * len(run_s))
        rounds = int(seconds / sum(max(taken, slice_s) for taken in run_s.values()) + 0.5)
        rounds = min(max(rounds, MIN_ROUNDS), ROUNDS)
        samples: dict[Candidate, list[list[float]]] = {candidate: [] for candidate in run_s}
        try:
            for turn in range(rounds):
                self._progress(f"batch {batch}", turn, rounds)
                running = [candidate for candidate in samples if candidate in self._workers]
                shift = turn % len(running)
                for candidate in running[shift:] + running[:shift]:
                    taken_s = self._ask(candidate, lambda worker: worker.round(slice_s, SAMPLES_A_ROUND))
                    if taken_s is not None:
                        samples[candidate].append(taken_s)
        except KeyboardInterrupt:
            whole = min(len(samples[candidate]) for candidate in samples if candidate in self._workers)
            if whole >= MIN_ROUNDS:  # with fewer, there is nothing to be said
                self._add_rows(batch, {candidate: series[:whole] for candidate, series in samples.items()}, errors, {}, {})
            raise
        memory = {each: self._ask(each, lambda worker: worker.memory()) for each in samples if each in self._workers}
        on_gpu = [each for each in samples if each in self._workers and each.device != "cpu"]
        times = {each: self._ask(each, lambda worker: worker.device_times()) for each in on_gpu}
        self._add_rows(batch, samples, errors, memory, times)

    def put_under(self, load: Load, batch: int, seconds: float) -> None:
        """Put each candidate that takes this batch size under load, one after the other."""
        for candidate in [each for each in self._workers if batch in each.batches]:
            said = f"concurrency {load.concurrency}" if load.concurrency else f"{load.rate:g} requests/s"
            if self._ready(candidate, batch, said) is None:
                continue
            done = self._ask(candidate, lambda worker: worker.load(load, seconds))
            if done is None:
                continue
            samples_ms = [value * 1e3 for value in done.latencies_s]
            found = latency(samples_ms)
            per_s = (len(samples_ms) - done.unanswered) / done.elapsed_s
            self.loads.append(
                LoadRow(
                    **candidate.named,
                    batch=batch,
                    concurrency=load.concurrency,
                    rate=load.rate,
                    requests=len(samples_ms),
                    unanswered=done.unanswered,
                    requests_per_s=per_s,
                    images_per_s=per_s * batch,
                    p50_ms=found.p50,
                    p90_ms=found.p90,
                    p99_ms=found.p99,
                    p999_ms=found.p999,
                    samples_ms=tuple(round(value, 6) for value in samples_ms),
                )
            )

    def judge(self, scenario: Scenario, seconds: float, logs: Path) -> None:
        """Put each candidate through one of LoadGen's scenarios, one after the other; all under the same targets."""
        for candidate in list(self._workers):
            taken = self._ready(candidate, 1, scenario.name)
            if taken is None:
                continue
            if scenario.name == "server" and (scenario.target_qps is None or scenario.target_ms is None):
                # What the baseline, which is asked first, answers with half its time idle.
                scenario = replace(
                    scenario,
                    target_qps=scenario.target_qps or 0.5 / taken.run_s,
                    target_ms=scenario.target_ms or 1e3 * SERVER_RUNS * taken.run_s,
                )
            manifest = candidate.artifact.manifest
            rows = max(candidate.batches) if rows_join(manifest.inputs, manifest.outputs) else 1
            folder = logs / "-".join((Path(candidate.artifact.shown).name, candidate.backend.replace(":", "-"), scenario.name))
            done = self._ask(candidate, partial(_judge, scenario, rows, taken.run_s, seconds, folder))
            if done is not None:
                self.scenarios.append(
                    ScenarioRow(
                        **candidate.named,
                        batch=rows,
                        scenario=scenario.name,
                        target_qps=scenario.target_qps,
                        target_ms=scenario.target_ms,
                        logs=str(folder),
                        **asdict(done),
                    )
                )

    def look_into(self, batch: int) -> None:
        """Time the layers of each candidate that takes this batch size; one that cannot tell is listed, and goes on."""
        for candidate in [each for each in self._workers if batch in each.batches]:
            if self._ready(candidate, batch, "layers") is None:
                continue
            try:
                layers = self._workers[candidate].layers()
            except WorkerDiedError as error:
                self._drop(candidate, str(error), self.failures)
            except BackendError as error:
                reason = f"no layers: {error}"
                self.skipped.append(Skipped(artifact=candidate.artifact.shown, backend=candidate.backend, reason=reason))
            else:
                self.layers.append(LayersRow(**candidate.named, batch=batch, layers=layers))

    def _ready(self, candidate: Candidate, batch: int, what: str) -> Prepared | None:
        """Warm the candidate up at this batch size; None where it failed."""
        self._progress(f"{what}: {self._workers[candidate].label}")
        return self._ask(candidate, lambda worker: worker.prepare(candidate.sizes(batch), data=self._data))

    def _add_rows(
        self,
        batch: int,
        samples: Mapping[Candidate, list[list[float]]],
        errors: Mapping[Candidate, float | None],
        memory: Mapping[Candidate, tuple[int, int | None] | None],
        device: Mapping[Candidate, DeviceTimes | None],
    ) -> None:
        baseline = samples[self._baseline]
        for candidate, series in samples.items():
            if candidate not in self._workers:
                continue
            host, gpu = memory.get(candidate) or (0, None)
            row = _row(candidate, batch, series, baseline, is_baseline=candidate is self._baseline)
            self.rows.append(
                replace(
                    row,
                    max_abs_error=errors[candidate],
                    first_ms=self._first_s[candidate] * 1e3,
                    load_s=self._load_s[candidate],
                    peak_bytes=host,
                    gpu_bytes=gpu,
                    **(asdict(times) if (times := device.get(candidate)) is not None else {}),
                )
            )

    def _prepare(self, sizes: dict[str, int], worker: CandidateProcess) -> Prepared:
        return worker.prepare(sizes, self._folder / f"{id(worker)}.npz", self._data)

    def _ask(self, candidate: Candidate, request: Callable[[CandidateProcess], T]) -> T | None:
        """What the candidate's worker replies; None when it failed, which ends its part. Raises for the baseline."""
        try:
            return request(self._workers[candidate])
        except BackendError as error:
            if candidate is self._baseline:
                raise
            self._drop(candidate, str(error), self.failures)
            return None

    def _drop(self, candidate: Candidate, reason: str, into: list[Skipped]) -> None:
        self._workers.pop(candidate).close()
        into.append(Skipped(artifact=candidate.artifact.shown, backend=candidate.backend, reason=reason))

    def _errors(self, candidates: Sequence[Candidate]) -> dict[Candidate, float | None]:
        """The largest difference of each candidate's outputs to the baseline's; the files are removed."""
        paths = {candidate: self._folder / f"{id(self._workers[candidate])}.npz" for candidate in candidates}
        with np.load(paths[self._baseline]) as expected:
            reference = list(expected.values())
        errors: dict[Candidate, float | None] = {}
        for candidate, path in paths.items():
            with np.load(path) as file:
                outputs = list(file.values())
            path.unlink()
            if [x.shape for x in outputs] != [x.shape for x in reference]:
                self._drop(candidate, "its outputs have other shapes than those of the baseline", self.failures)
                continue
            found = max(difference(x, wanted).max_abs for x, wanted in zip(outputs, reference, strict=True))
            errors[candidate] = found if math.isfinite(found) else None
        return errors


def _judge(scenario: Scenario, rows: int, run_s: float, seconds: float, folder: Path, worker: CandidateProcess) -> Judged:
    return worker.judge(scenario, rows, run_s, seconds, folder)


def _row(
    candidate: Candidate, batch: int, series: list[list[float]], baseline: list[list[float]], *, is_baseline: bool
) -> BenchRow:
    """The figures of the samples; what else there is to say is filled in by the caller."""
    samples_ms = [value * 1e3 for value in chain.from_iterable(series)]
    found = latency(samples_ms)
    speed = paired_ratio(baseline, series)
    accuracy = candidate.artifact.manifest.accuracy
    return BenchRow(
        **candidate.named,
        batch=batch,
        p50_ms=found.p50,
        p90_ms=found.p90,
        p99_ms=found.p99,
        p999_ms=found.p999,
        mean_ms=found.mean,
        images_per_s=batch / found.mean * 1e3,
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
        gflops=None,
        roof_gflops=None,
        gpu_ms=None,
        h2d_ms=None,
        d2h_ms=None,
        samples_ms=tuple(round(value, 6) for value in samples_ms),
        rounds=tuple(len(part) for part in series),
    )
