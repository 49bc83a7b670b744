"""The benchmark: every candidate and eager PyTorch in processes of their own, in turns.

Candidates in one process falsify one another (thread pools, allocators, caches), and candidates measured one after the
other meet different machines (clock rate, other programs). So each has a process, and they take turns in rounds, in an
order that rotates, the others blocked on their pipes. The speed-up is of samples of the same rounds: see `timing.paired_ratio`.
"""

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deploy.artifact import Artifact
from deploy.bench.conditions import conditions, gpu_state
from deploy.bench.load import Load
from deploy.bench.loadgen import Judged, Scenario, check_installed
from deploy.bench.plan import BenchOptions, Candidate, Plan, Skipped, make_plan
from deploy.bench.process import Prepared, WorkerDiedError, WorkerProcess
from deploy.bench.roofline import Peak, Work, attainable, count_work, measure_peak
from deploy.bench.rows import BenchResult, BenchRow, LayersRow, LoadRow, ScenarioRow, verdict_of
from deploy.bench.shapes import shown_shapes
from deploy.describe import evidence, megabytes
from deploy.errors import ArtifactError, BackendError
from deploy.evaluation import evaluate
from deploy.machine import usable_cores
from deploy.parity import difference
from deploy.progress import Progress, silent
from deploy.runtime.session import SessionOptions
from deploy.timing import latency, paired_ratio

ROUNDS = 15
MIN_ROUNDS = 5
SAMPLES_A_ROUND = 500
SERVER_RUNS = 10
"""Of the scenario `server`: runs of the baseline that a query may take unless a limit is given."""

T = TypeVar("T")


def bench(
    artifacts: Sequence[Artifact],
    options: BenchOptions | None = None,
    *,
    named: bool = True,
    progress: Progress = silent,
) -> BenchResult:
    """Measure every artifact on every backend against eager PyTorch, or another baseline.

    `named`: the user named the artifacts (they were not found under build/), so that one that cannot run here is an
    error and not an entry in `skipped`; the same holds for backends in the options. Raises UsageError, ArtifactError or
    BackendError before anything is measured, and BackendError when the baseline fails. Ctrl-C ends the measuring: what was
    measured comes back, marked as interrupted, or KeyboardInterrupt is raised where that is nothing.
    """
    options = options or BenchOptions()
    plan = make_plan(artifacts, options, named=named)
    if options.scenarios:
        check_installed()
    threads = options.threads or usable_cores()
    found = conditions(threads=threads, device=plan.baseline.device)
    if shapes := shown_shapes(plan.baseline.artifact.manifest, plan.baseline.dims):
        found["shapes"] = shapes
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deploy-bench-")))
        run = _Run(plan, SessionOptions(threads=threads), options.data, stack, folder, progress)
        run.open(named_artifacts=named, named_backends=bool(options.backends) and not options.skip_missing)
        try:
            for batch in plan.batches:
                run.measure(batch, options.seconds / len(plan.batches))
            for load in options.loads:
                run.put_under(load, plan.batches[0], options.load_s)
            for scenario in options.scenarios:
                run.judge(scenario, plan.batches, options.load_s, options.logs)
            if options.layers:
                run.look_into(plan.batches[0])
            interrupted = False
        except KeyboardInterrupt:
            if not run.rows:
                raise
            interrupted = True
    found["inputs"] = {"from": str(options.data) if options.data else "random", "by_batch": run.inputs}
    if plan.baseline.device == "cpu" and not interrupted:
        peak = measure_peak()  # after the candidates: their processes are gone
        found["peak"] = {"gflops": peak.flops / 1e9, "gbytes_per_s": peak.bytes_per_s / 1e9}
        run.rows = _under_roof(run.rows, run.candidates, peak)
    found["gpu_after"] = gpu_state() if found["gpu"] is not None else None
    found["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    rows = run.rows
    if options.evaluate is not None and not interrupted:
        rows = _evaluated(rows, run.candidates, options.evaluate, threads, progress)
    return BenchResult(
        conditions=found,
        results=tuple(rows),
        skipped=(*plan.skipped, *run.skipped),
        failures=tuple(run.failures),
        baseline=options.baseline,
        interrupted=interrupted,
        artifacts=_described(artifacts),
        loads=tuple(run.loads),
        scenarios=tuple(run.scenarios),
        layers=tuple(run.layers),
    )


def _under_roof(rows: Sequence[BenchRow], candidates: Sequence[Candidate], peak: Peak) -> list[BenchRow]:
    works: dict[tuple[str, int], Work | None] = {}
    found = []
    for row in rows:
        candidate = next(each for each in candidates if (each.artifact.shown, each.backend) == (row.artifact, row.backend))
        key = (row.artifact, row.batch)
        if key not in works:
            works[key] = count_work(candidate.artifact, candidate.sizes(row.batch))
        work = works[key]
        if work is not None and work.operations and row.backend != "null":
            row = replace(row, gflops=work.operations / row.p50_ms / 1e6, roof_gflops=attainable(work, peak) / 1e9)
        found.append(row)
    return found


def _described(artifacts: Sequence[Artifact]) -> tuple[dict[str, Any], ...]:
    """What there is to say of `artifacts` and their ancestors, parents first."""
    found: dict[str, dict[str, Any]] = {}
    for artifact in artifacts:
        line = [artifact]
        with suppress(ArtifactError):  # a parent that is gone: the line ends there
            while (parent := line[-1].parent()) is not None:
                line.append(parent)
        for each in reversed(line):
            manifest = each.manifest
            kind = f"{manifest.target.flavour} {manifest.target.version} engine" if manifest.target else "ONNX"
            found[manifest.digest] = {
                "digest": manifest.digest,
                "parent": manifest.parent.digest if manifest.parent else None,
                "name": manifest.name,
                "what": f"{kind}, {manifest.precision}, {megabytes(each.size)}",
                "evidence": evidence(manifest),
                "state_dict": manifest.source.state_dict,
                "weights": manifest.source.weights,
                "random": manifest.source.random,
            }
    return tuple(found.values())


def _evaluated(
    rows: Sequence[BenchRow], candidates: Sequence[Candidate], folder: Path, threads: int, progress: Progress
) -> list[BenchRow]:
    """The rows with the accuracy of their candidates on `folder`, each measured once."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for candidate in candidates:
        key = (candidate.artifact.shown, candidate.backend)
        if any((row.artifact, row.backend) == key for row in rows):
            progress(f"accuracy of {key[0]} on {key[1]}")
            done = evaluate(candidate.artifact, folder, backend=candidate.backend, device=candidate.device, threads=threads)
            found[key] = (done.top1, done.top5)
    return [
        replace(row, top1=found[row.artifact, row.backend][0], top5=found[row.artifact, row.backend][1], accuracy_from="measured")
        for row in rows
    ]


class _Run:
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
                WorkerProcess(candidate.artifact, candidate.backend, replace(options, device=candidate.device))
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
                self._add_rows(batch, {candidate: series[:whole] for candidate, series in samples.items()}, errors, {})
            raise
        memory = {each: self._ask(each, lambda worker: worker.memory()) for each in samples if each in self._workers}
        self._add_rows(batch, samples, errors, memory)
        for index, row in enumerate(self.rows):
            if row.batch == batch and (candidate := self._candidate_of(row)) in self._workers and candidate.device != "cpu":
                times = self._ask(candidate, lambda worker: worker.device_times())
                if times is not None:
                    self.rows[index] = replace(row, gpu_ms=times.gpu_ms, h2d_ms=times.h2d_ms, d2h_ms=times.d2h_ms)

    def put_under(self, load: Load, batch: int, seconds: float) -> None:
        """Put each candidate that takes this batch size under load, one after the other."""
        for candidate in [each for each in self._workers if batch in each.batches]:
            said = f"concurrency {load.concurrency}" if load.concurrency else f"{load.rate:g} requests/s"
            self._progress(f"{said}: {self._workers[candidate].label}")
            if self._ask(candidate, partial(self._prepare, candidate.sizes(batch))) is None:
                continue
            (self._folder / f"{id(self._workers[candidate])}.npz").unlink()
            done = self._ask(candidate, lambda worker: worker.load(load, seconds))
            if done is None:
                continue
            samples_ms = [value * 1e3 for value in done.latencies_s]
            found = latency(samples_ms)
            per_s = (len(samples_ms) - done.unanswered) / done.elapsed_s
            self.loads.append(
                LoadRow(
                    artifact=candidate.artifact.shown,
                    precision=candidate.precision,
                    backend=candidate.backend,
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

    def judge(self, scenario: Scenario, batches: Sequence[int], seconds: float, logs: Path) -> None:
        """Put each candidate through one of LoadGen's scenarios, one after the other; all under the same targets."""
        for candidate in list(self._workers):
            worker = self._workers[candidate]
            self._progress(f"{scenario.name}: {worker.label}")
            rows = max(each for each in candidate.batches) if candidate.sizes(1) != candidate.sizes(2) else 1
            taken = self._ask(candidate, partial(self._prepare, candidate.sizes(1)))
            if taken is None:
                continue
            (self._folder / f"{id(worker)}.npz").unlink()
            if scenario.name == "server" and (scenario.target_qps is None or scenario.target_ms is None):
                # What the baseline, which is asked first, answers with half its time idle.
                scenario = replace(
                    scenario,
                    target_qps=scenario.target_qps or 0.5 / taken.run_s,
                    target_ms=scenario.target_ms or 1e3 * SERVER_RUNS * taken.run_s,
                )
            folder = logs / "-".join((Path(candidate.artifact.shown).name, candidate.backend.replace(":", "-"), scenario.name))
            done = self._ask(candidate, partial(self._ask_judge, scenario, rows, taken.run_s, seconds, folder))
            if done is None:
                continue
            self.scenarios.append(
                ScenarioRow(
                    artifact=candidate.artifact.shown,
                    precision=candidate.precision,
                    backend=candidate.backend,
                    batch=rows,
                    scenario=scenario.name,
                    target_qps=scenario.target_qps,
                    target_ms=scenario.target_ms,
                    logs=str(folder),
                    **asdict(done),
                )
            )

    @staticmethod
    def _ask_judge(scenario: Scenario, rows: int, run_s: float, seconds: float, folder: Path, worker: WorkerProcess) -> Judged:
        return worker.judge(scenario, rows, run_s, seconds, folder)

    def look_into(self, batch: int) -> None:
        """Time the layers of each candidate that takes this batch size; one that cannot tell is listed, and goes on."""
        for candidate in [each for each in self._workers if batch in each.batches]:
            worker = self._workers[candidate]
            self._progress(f"layers: {worker.label}")
            if self._ask(candidate, partial(self._prepare, candidate.sizes(batch))) is None:
                continue
            (self._folder / f"{id(worker)}.npz").unlink()
            try:
                layers = worker.layers()
            except WorkerDiedError as error:
                self._drop(candidate, str(error), self.failures)
            except BackendError as error:
                reason = f"no layers: {error}"
                self.skipped.append(Skipped(artifact=candidate.artifact.shown, backend=candidate.backend, reason=reason))
            else:
                self.layers.append(
                    LayersRow(
                        artifact=candidate.artifact.shown,
                        precision=candidate.precision,
                        backend=candidate.backend,
                        batch=batch,
                        layers=layers,
                    )
                )

    def _candidate_of(self, row: BenchRow) -> Candidate:
        return next(each for each in self.candidates if (each.artifact.shown, each.backend) == (row.artifact, row.backend))

    def _add_rows(
        self,
        batch: int,
        samples: Mapping[Candidate, list[list[float]]],
        errors: Mapping[Candidate, float | None],
        memory: Mapping[Candidate, tuple[int, int | None] | None],
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
                )
            )

    def _prepare(self, sizes: dict[str, int], worker: WorkerProcess) -> Prepared:
        return worker.prepare(sizes, self._folder / f"{id(worker)}.npz", self._data)

    def _ask(self, candidate: Candidate, request: Callable[[WorkerProcess], T]) -> T | None:
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


def _row(
    candidate: Candidate, batch: int, series: list[list[float]], baseline: list[list[float]], *, is_baseline: bool
) -> BenchRow:
    """The figures of the samples; what else there is to say is filled in by the caller."""
    samples_ms = [value * 1e3 for value in chain.from_iterable(series)]
    found = latency(samples_ms)
    speed = paired_ratio(baseline, series)
    accuracy = candidate.artifact.manifest.accuracy
    return BenchRow(
        artifact=candidate.artifact.shown,
        precision=candidate.precision,
        backend=candidate.backend,
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
