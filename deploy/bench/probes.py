"""What candidates are asked beyond rounds, one after the other: answers under load, LoadGen's scenarios, times of layers.

Each function yields a row as soon as it is measured, so that Ctrl-C keeps the rows before it.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from deploy.artifact.tensors import rows_join
from deploy.bench.candidate.loadgen import Judged, Scenario, folder_names
from deploy.bench.candidate.process import CandidateProcess
from deploy.bench.candidate.traffic import Answered, Load
from deploy.bench.plan import Candidate
from deploy.bench.rows import LayersRow, LoadRow, ScenarioRow
from deploy.bench.workers import Workers
from deploy.evidence.disturbance import Use, reason, watch
from deploy.evidence.timing import latency

SERVER_RUNS = 10
"""Of the scenario `server`: the limit of a query, in runs of the baseline, unless a limit is given."""


def load_rows(workers: Workers, load: Load, batch: int, seconds: float) -> Iterator[LoadRow]:
    """Every candidate that takes this batch size, under `load` for `seconds`."""
    what = f"concurrency {load.concurrency}:" if load.concurrency else f"{load.rate:g} requests/s:"
    for candidate in workers.running(batch):
        if workers.prepare(candidate, batch, what) is None:
            continue
        done = workers.ask(candidate, lambda process: _watched(process, load, seconds))
        if done is not None:
            yield _load_row(candidate, load, batch, *done)


def _watched(process: CandidateProcess, load: Load, seconds: float) -> tuple[Answered, Use]:
    """The answers under `load`; each caller needs the threads of a run."""
    return watch(process.pid, process.threads * (load.concurrency or 1), lambda: process.load(load, seconds))


def _load_row(candidate: Candidate, load: Load, batch: int, done: Answered, use: Use) -> LoadRow:
    samples_ms = [value * 1e3 for value in done.latencies_s]
    times = latency(samples_ms)
    per_s = (len(samples_ms) - done.unanswered) / done.elapsed_s
    return LoadRow(
        **candidate.named,
        batch=batch,
        concurrency=load.concurrency,
        rate=load.rate,
        requests=len(samples_ms),
        unanswered=done.unanswered,
        requests_per_s=per_s,
        images_per_s=per_s * batch,
        p50_ms=times.p50,
        p90_ms=times.p90,
        p99_ms=times.p99,
        p999_ms=times.p999,
        certain=use.quiet,
        uncertain_because=None if use.quiet else reason(use),
        samples_ms=tuple(round(value, 6) for value in samples_ms),
    )


def scenario_rows(workers: Workers, scenario: Scenario, seconds: float, logs: Path) -> Iterator[ScenarioRow]:
    """Every candidate in one of LoadGen's scenarios, all under the same targets; logs go to folders below `logs`."""
    names = folder_names([(candidate.artifact.shown, candidate.backend) for candidate in workers.candidates])
    folders = {candidate: logs / f"{name}-{scenario.name}" for candidate, name in zip(workers.candidates, names, strict=True)}
    for candidate in workers.running():
        prepared = workers.prepare(candidate, 1, f"{scenario.name}:")
        if prepared is None:
            continue
        scenario = _with_targets(scenario, prepared.run_s)  # those of the baseline, which comes first
        manifest = candidate.artifact.manifest
        rows = max(candidate.batches) if rows_join(manifest.inputs, manifest.outputs) else 1
        done = workers.ask(candidate, partial(_judge, scenario, rows, prepared.run_s, seconds, folders[candidate]))
        if done is not None:
            yield ScenarioRow(
                **candidate.named,
                batch=rows,
                scenario=scenario.name,
                target_qps=scenario.target_qps,
                target_ms=scenario.target_ms,
                logs=str(folders[candidate]),
                **asdict(done),
            )


def _with_targets(scenario: Scenario, run_s: float) -> Scenario:
    """The scenario `server` with the targets that it lacks: what a candidate with runs of `run_s` answers half idle."""
    if scenario.name != "server":
        return scenario
    return replace(
        scenario,
        target_qps=scenario.target_qps or 0.5 / run_s,
        target_ms=scenario.target_ms or 1e3 * SERVER_RUNS * run_s,
    )


def _judge(scenario: Scenario, rows: int, run_s: float, seconds: float, folder: Path, process: CandidateProcess) -> Judged:
    return process.judge(scenario, rows, run_s, seconds, folder)


def layer_rows(workers: Workers, batch: int) -> Iterator[LayersRow]:
    """The times of the layers of every candidate that takes this batch size; one that reports none is listed as skipped."""
    for candidate in workers.running(batch):
        if workers.prepare(candidate, batch, "layers:") is None:
            continue
        layers = workers.ask_or_skip(candidate, lambda process: process.layers(), "no layers")
        if layers is not None:
            yield LayersRow(**candidate.named, batch=batch, layers=layers)
