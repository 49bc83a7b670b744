"""The benchmark: every candidate and eager PyTorch in separate processes, which take turns.

Candidates in one process distort each other's times (thread pools, allocators, caches), and candidates measured one after the
other meet a machine in different states (clock rate, other programs). So each has its own process, and they take turns in
rounds, in an order that rotates; the others block on their pipes. Speed-ups compare samples of the same rounds: see
`timing.paired_ratio`.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Score
from deploy.artifact.summary import evidence, kind_text, megabytes
from deploy.bench.candidate.loadgen import check_installed
from deploy.bench.conditions import conditions, disturbance
from deploy.bench.options import BenchOptions
from deploy.bench.plan import Candidate, make_plan
from deploy.bench.probes import layer_rows, load_rows, scenario_rows
from deploy.bench.roofline import Peak, Work, attainable, count_work, measure_peak
from deploy.bench.rows import BenchResult, BenchRow, LayersRow, LoadRow, ScenarioRow
from deploy.bench.run import Run
from deploy.bench.shapes import shown_shapes
from deploy.bench.workers import Workers
from deploy.errors import ArtifactError
from deploy.evaluation.evaluate import Evaluation, evaluate
from deploy.evaluation.options import MetricOptions
from deploy.evaluation.scoring import FIDELITY, check_scoring
from deploy.host.cpu import usable_cores
from deploy.host.nvidia_smi import summed_up
from deploy.progress import Progress, silent
from deploy.runtime.catalog import split_backend
from deploy.runtime.session import SessionOptions


def bench(
    artifacts: Sequence[Artifact],
    options: BenchOptions | None = None,
    *,
    named: bool = True,
    progress: Progress = silent,
) -> BenchResult:
    """Measure every artifact on every backend against eager PyTorch, or another baseline.

    `named`: the user named the artifacts (they were not collected from build/), so that one that cannot run here is an
    error and not an entry in `skipped`; the same holds for backends in the options. Raises UsageError, ArtifactError or
    BackendError before anything is measured, and BackendError when the baseline fails. Ctrl-C ends the measurement: the rows
    so far are returned, marked as interrupted; KeyboardInterrupt is raised if there are none.
    """
    options = options or BenchOptions()
    plan = make_plan(artifacts, options, named=named)
    if options.scenarios:
        check_installed()
    if options.evaluate is not None:
        metric = MetricOptions(metric=options.metric, ignore_index=options.ignore_index)
        for artifact in {str(each.artifact.location): each.artifact for each in plan.candidates}.values():
            check_scoring(artifact, options.evaluate, metric)
    threads = options.threads or usable_cores()
    measured = _Measured()
    where = conditions(threads=threads, device=plan.baseline.device)
    if shapes := shown_shapes(plan.baseline.artifact.manifest, plan.baseline.dims):
        where["shapes"] = shapes
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deploy-bench-")))
        workers = Workers(plan, SessionOptions(threads=threads), options.data, stack, progress)
        run = Run(workers, folder)
        workers.open(named_artifacts=named, named_backends=bool(options.backends) and not options.skip_missing)
        try:
            _measure(run, workers, plan.batches, options, measured)
            interrupted = False
        except KeyboardInterrupt:
            if not run.rows:
                raise
            interrupted = True
    where["inputs"] = {"from": str(options.data) if options.data else "random", "by_batch": run.inputs}
    rows = run.rows
    if plan.baseline.device == "cpu" and not interrupted:
        peak = measure_peak()  # after the candidates: their processes are gone
        where["peak"] = {"gflops": peak.flops / 1e9, "gbytes_per_s": peak.bytes_per_s / 1e9}
        rows = _under_roof(rows, workers.candidates, peak)
    where["disturbance"] = disturbance(run.uses, run.repeated, run.cores)
    where["gpu_during"] = summed_up(run.gpu)
    where["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    if options.evaluate is not None and not interrupted:
        rows = _evaluated(rows, workers.candidates, workers.baseline, options, progress)
    return BenchResult(
        conditions=where,
        results=tuple(rows),
        skipped=(*plan.skipped, *workers.skipped),
        failures=tuple(workers.failures),
        baseline=options.baseline,
        interrupted=interrupted,
        artifacts=_described(artifacts),
        loads=tuple(measured.loads),
        scenarios=tuple(measured.scenarios),
        layers=tuple(measured.layers),
    )


@dataclass
class _Measured:
    """What the probes have measured so far."""

    loads: list[LoadRow] = field(default_factory=list)
    scenarios: list[ScenarioRow] = field(default_factory=list)
    layers: list[LayersRow] = field(default_factory=list)


def _measure(run: Run, workers: Workers, batches: Sequence[int], options: BenchOptions, measured: _Measured) -> None:
    """The rounds of every batch size, then the probes that `options` ask for; Ctrl-C leaves the rows before it."""
    for batch in batches:
        run.measure(batch, options.seconds / len(batches))
    for load in options.loads:
        measured.loads.extend(load_rows(workers, load, batches[0], options.load_seconds))
    for scenario in options.scenarios:
        measured.scenarios.extend(scenario_rows(workers, scenario, options.load_seconds, options.logs))
    if options.layers:
        measured.layers.extend(layer_rows(workers, batches[0]))


def _under_roof(rows: Sequence[BenchRow], candidates: Sequence[Candidate], peak: Peak) -> list[BenchRow]:
    """The rows with the operations a second that they reach, and those that the roofline allows."""
    works: dict[tuple[str, int], Work | None] = {}
    roofed = []
    for row in rows:
        candidate = next(other for other in candidates if (other.artifact.shown, other.backend) == (row.artifact, row.backend))
        key = (row.artifact, row.batch)
        if key not in works:
            works[key] = count_work(candidate.artifact, candidate.sizes(row.batch))
        work = works[key]
        if work is not None and work.operations and split_backend(row.backend)[0].computes:
            row = replace(row, gflops=work.operations / row.p50_ms / 1e6, roof_gflops=attainable(work, peak) / 1e9)
        roofed.append(row)
    return roofed


def _described(artifacts: Sequence[Artifact]) -> tuple[dict[str, Any], ...]:
    """A description of `artifacts` and their ancestors, parents first."""
    descriptions: dict[str, dict[str, Any]] = {}
    for artifact in artifacts:
        line = [artifact]
        with suppress(ArtifactError):  # a parent that is gone: the line ends there
            while (parent := line[-1].parent()) is not None:
                line.append(parent)
        for ancestor in reversed(line):
            manifest = ancestor.manifest
            descriptions[manifest.digest] = {
                "digest": manifest.digest,
                "parent": manifest.parent.digest if manifest.parent else None,
                "name": manifest.name,
                "what": f"{kind_text(manifest)}, {manifest.precision}, {megabytes(ancestor.size)}",
                "evidence": evidence(manifest),
                "state_dict": manifest.source.state_dict,
                "weights": manifest.source.weights,
                "random": manifest.source.random,
            }
    return tuple(descriptions.values())


def _evaluated(
    rows: Sequence[BenchRow], candidates: Sequence[Candidate], baseline: Candidate, options: BenchOptions, progress: Progress
) -> list[BenchRow]:
    """The rows with the accuracy of their candidates on the data of `options`; every candidate is evaluated once, the baseline first."""
    assert options.evaluate is not None
    first: Evaluation | None = None
    accuracy: dict[tuple[str, str], dict[str, Any]] = {}
    for candidate in sorted(candidates, key=lambda each: each is not baseline):
        key = (candidate.artifact.shown, candidate.backend)
        if not any((row.artifact, row.backend) == key for row in rows):
            continue
        progress(f"accuracy of {key[0]} on {key[1]}")
        done = evaluate(
            candidate.artifact,
            options.evaluate,
            metric=options.metric,
            ignore_index=options.ignore_index,
            backend=candidate.backend,
            device=candidate.device,
            threads=options.threads or usable_cores(),
        )
        first = done if candidate is baseline else first
        accuracy[key] = {"top1": done.top1, "top5": done.top5, "score": _score(done, first)}
    return [replace(row, **accuracy[row.artifact, row.backend], accuracy_from="measured") for row in rows]


def _score(done: Evaluation, baseline: Evaluation | None) -> dict[str, Any]:
    """The score as JSON, with the loss to the baseline; infinity, of outputs without any difference, is None."""
    compared: dict[str, float] = {}
    if baseline is not None and done is not baseline and baseline.files == done.files and done.metric not in FIDELITY:
        compared = {"parent": baseline.value, "loss": done.measured.loss(baseline.measured)}
        if (interval := done.measured.loss_interval(baseline.measured)) is not None:
            compared |= {"loss_low": interval.low, "loss_high": interval.high}
    score = Score(
        metric=done.metric,
        value=done.value,
        unit=done.unit,
        lower=done.measured.lower,
        low=done.low,
        high=done.high,
        **compared,
    )
    return {name: None if value in (math.inf, -math.inf) else value for name, value in msgspec.to_builtins(score).items()}
