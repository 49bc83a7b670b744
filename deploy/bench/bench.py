"""The benchmark: every candidate and eager PyTorch in processes of their own, in turns.

Candidates in one process falsify one another (thread pools, allocators, caches), and candidates measured one after the
other meet different machines (clock rate, other programs). So each has a process, and they take turns in rounds, in an
order that rotates, the others blocked on their pipes. The speed-up is of samples of the same rounds: see `timing.paired_ratio`.
"""

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.artifact.artifact import Artifact
from deploy.artifact.summary import evidence, megabytes
from deploy.bench.candidate.loadgen import check_installed
from deploy.bench.conditions import conditions
from deploy.bench.plan import BenchOptions, Candidate, make_plan
from deploy.bench.roofline import Peak, Work, attainable, count_work, measure_peak
from deploy.bench.rows import BenchResult, BenchRow
from deploy.bench.run import Run
from deploy.bench.shapes import shown_shapes
from deploy.errors import ArtifactError
from deploy.evaluation.evaluate import evaluate
from deploy.host.cpu import usable_cores
from deploy.host.nvidia_smi import gpu_state
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
        run = Run(plan, SessionOptions(threads=threads), options.data, stack, folder, progress)
        run.open(named_artifacts=named, named_backends=bool(options.backends) and not options.skip_missing)
        try:
            for batch in plan.batches:
                run.measure(batch, options.seconds / len(plan.batches))
            for load in options.loads:
                run.put_under(load, plan.batches[0], options.load_s)
            for scenario in options.scenarios:
                run.judge(scenario, options.load_s, options.logs)
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
        if work is not None and work.operations and split_backend(row.backend)[0].computes:
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
