"""The benchmark: every candidate and eager PyTorch in processes of their own, in turns.

Candidates in one process falsify one another (thread pools, allocators, caches), and candidates measured one after the
other meet different machines (clock rate, other programs). So each has a process, and they take turns in rounds, in an
order that rotates, the others blocked on their pipes. The speed-up is of samples of the same rounds: see `timing.paired_ratio`.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deploy.artifact import Artifact
from deploy.bench.conditions import conditions
from deploy.bench.plan import BenchOptions, Candidate, Plan, Skipped, make_plan
from deploy.bench.process import WorkerDiedError, WorkerProcess
from deploy.bench.shapes import shown_shapes
from deploy.errors import BackendError
from deploy.machine import usable_cores
from deploy.parity import difference
from deploy.progress import Progress, silent
from deploy.runtime.session import SessionOptions
from deploy.timing import latency, paired_ratio

SCHEMA = 1
ROUNDS = 15
MIN_ROUNDS = 5
SAMPLES_A_ROUND = 500

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One candidate at one batch size, on random input of a fixed seed, from numpy arrays to numpy arrays.

    images_per_s: batch divided by the mean time of a run. speedup, speedup_low, speedup_high: over eager, see
    `timing.paired_ratio`. max_abs_error: the largest difference to eager's outputs on the same input, None
    where only one of the two is finite. samples_ms: every run that was timed, in order.
    """

    artifact: str
    precision: str
    backend: str
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    max_abs_error: float | None
    samples_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All that was measured. `failures` are those of `skipped` that began to run and broke: the work failed."""

    conditions: dict[str, Any]
    results: tuple[BenchRow, ...]
    skipped: tuple[Skipped, ...]
    failures: tuple[Skipped, ...] = ()

    @property
    def failed(self) -> bool:
        return bool(self.failures)

    def to_json(self) -> dict[str, Any]:
        """The document of `deploy bench --json`; failures are among `skipped`."""
        return {
            "schema": SCHEMA,
            "conditions": self.conditions,
            "results": [asdict(row) for row in self.results],
            "skipped": [asdict(entry) for entry in (*self.skipped, *self.failures)],
        }


def bench(
    artifacts: Sequence[Artifact],
    options: BenchOptions | None = None,
    *,
    named: bool = True,
    progress: Progress = silent,
) -> BenchResult:
    """Measure every artifact on every backend against eager PyTorch.

    `named`: the user named the artifacts (they were not found under build/), so that one that cannot run here is an
    error and not an entry in `skipped`; the same holds for backends in the options. Raises UsageError, ArtifactError or
    BackendError before anything is measured, and BackendError when the baseline fails.
    """
    options = options or BenchOptions()
    plan = make_plan(artifacts, options, named=named)
    threads = options.threads or usable_cores()
    found = conditions(threads=threads, device=plan.baseline.device)
    if shapes := shown_shapes(plan.baseline.artifact.manifest, plan.baseline.dims):
        found["shapes"] = shapes
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deploy-bench-")))
        run = _Run(plan, SessionOptions(threads=threads), stack, folder, progress)
        run.open(named_artifacts=named, named_backends=bool(options.backends))
        for batch in plan.batches:
            run.measure(batch, options.seconds / len(plan.batches))
    return BenchResult(
        conditions=found, results=tuple(run.rows), skipped=(*plan.skipped, *run.skipped), failures=tuple(run.failures)
    )


class _Run:
    """The workers of one benchmark and what they have found so far."""

    def __init__(self, plan: Plan, options: SessionOptions, stack: ExitStack, folder: Path, progress: Progress) -> None:
        self.rows: list[BenchRow] = []
        self.skipped: list[Skipped] = []
        self.failures: list[Skipped] = []
        everyone = (plan.baseline, *plan.candidates)
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
                worker.wait_open()
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
                run_s[candidate] = taken
        errors = self._errors(list(run_s))
        run_s = {candidate: taken for candidate, taken in run_s.items() if candidate in self._workers}
        slice_s = seconds / (ROUNDS * len(run_s))
        rounds = int(seconds / sum(max(taken, slice_s) for taken in run_s.values()) + 0.5)
        rounds = min(max(rounds, MIN_ROUNDS), ROUNDS)
        samples: dict[Candidate, list[list[float]]] = {candidate: [] for candidate in run_s}
        for turn in range(rounds):
            self._progress(f"batch {batch}", turn, rounds)
            running = [candidate for candidate in samples if candidate in self._workers]
            shift = turn % len(running)
            for candidate in running[shift:] + running[:shift]:
                taken_s = self._ask(candidate, lambda worker: worker.round(slice_s, SAMPLES_A_ROUND))
                if taken_s is not None:
                    samples[candidate].append(taken_s)
        baseline = samples[self._baseline]
        for candidate, series in samples.items():
            if candidate in self._workers:
                self.rows.append(_row(candidate, batch, series, baseline, errors[candidate]))

    def _prepare(self, sizes: dict[str, int], worker: WorkerProcess) -> float:
        return worker.prepare(sizes, self._folder / f"{id(worker)}.npz")

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
                self._drop(candidate, "its outputs have other shapes than those of eager", self.failures)
                continue
            found = max(difference(x, wanted).max_abs for x, wanted in zip(outputs, reference, strict=True))
            errors[candidate] = found if math.isfinite(found) else None
        return errors


def _row(
    candidate: Candidate, batch: int, series: list[list[float]], baseline: list[list[float]], max_abs_error: float | None
) -> BenchRow:
    samples_ms = [value * 1e3 for value in chain.from_iterable(series)]
    found = latency(samples_ms)
    speed = paired_ratio(baseline, series)
    return BenchRow(
        artifact=candidate.artifact.shown,
        precision=candidate.precision,
        backend=candidate.backend,
        batch=batch,
        p50_ms=found.p50,
        p90_ms=found.p90,
        p99_ms=found.p99,
        images_per_s=batch / found.mean * 1e3,
        speedup=speed.value,
        speedup_low=speed.low,
        speedup_high=speed.high,
        max_abs_error=max_abs_error,
        samples_ms=tuple(round(value, 6) for value in samples_ms),
    )
