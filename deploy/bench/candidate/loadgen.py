"""MLPerf Inference's LoadGen over a session: its scenarios, its clock and its verdict.

LoadGen (Reddi et al., MLPerf Inference Benchmark, ISCA 2020) makes the queries, times them and judges the run; this module hands
its samples to the session. A sample is one row of a batch, or one feed if the artifact has a fixed batch.
"""

import importlib
import itertools
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.tensors import Feed
from deploy.errors import BackendError, UsageError
from deploy.host.extras import missing
from deploy.runtime.session import Session

SCENARIOS = ("single-stream", "multi-stream", "server", "offline")

QUERIES = {"single-stream": 64, "multi-stream": 662, "server": 700, "offline": 1}
"""Minimum number of queries. LoadGen wants 99 % confidence in its percentiles, which fewer queries cannot give."""

LIMIT_S = 60.0
"""A scenario ends after this time even with fewer queries; LoadGen then reports INVALID, with the reason."""

STREAMS = 8
"""Samples in one query of multi-stream, as in the rules of MLPerf Inference."""

_MOST_SAMPLES = 1024
_HASTE = 0.6
_IDLE_NOTES = ("Processed ", "Run ", "Would discard", "Early stopping ")
_LOGS = ("mlperf_log_summary.txt", "mlperf_log_detail.txt")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One of LoadGen's scenarios. target_qps, target_ms: for `server`, queries a second and the latency limit of 99 % of them."""

    name: str
    target_qps: float | None = None
    target_ms: float | None = None

    def __post_init__(self) -> None:
        if self.name not in SCENARIOS:
            raise UsageError(f"unknown scenario {self.name!r}; expected one of {', '.join(SCENARIOS)}")
        for value, option in ((self.target_qps, "`target_qps`"), (self.target_ms, "`target_ms`")):
            if value is not None and self.name != "server":
                raise UsageError(f"{option} is only for `scenarios` server")
            if value is not None and not value > 0:
                raise UsageError(f"{option} must be more than 0, not {value:g}")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """LoadGen's verdict. value, unit: its own figure for the scenario: `samples/s`, or `ms` at its percentile.

    reasons: why the run is not valid. queries: how many were made. Latencies are those of queries, in milliseconds.
    """

    valid: bool
    reasons: tuple[str, ...]
    value: float
    unit: str
    queries: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float


def check_installed() -> None:
    """Raise BackendError unless LoadGen can be imported."""
    try:
        importlib.import_module("mlperf_loadgen")
    except ImportError as error:
        raise missing(error, "`scenarios`") or BackendError(f"`scenarios` needs MLPerf's LoadGen: {error}") from error


def run_scenario(
    session: Session, scenario: Scenario, feeds: Sequence[Feed], *, most_rows: int, run_s: float, seconds: float, folder: Path
) -> Judged:
    """Run LoadGen for at least `seconds`; its logs are written to `folder`.

    feeds: the samples. most_rows: largest number of samples in a batch; 1 for artifacts with a fixed batch. run_s: seconds that
    one sample takes, roughly. Raises the errors of the session.
    """
    lg: Any = importlib.import_module("mlperf_loadgen")
    feeds = feeds[:_MOST_SAMPLES]
    settings: Any = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, "".join(part.capitalize() for part in scenario.name.split("-")))
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = round(seconds * 1e3)
    settings.max_duration_ms = round(max(LIMIT_S, 2 * seconds) * 1e3)
    settings.min_query_count = QUERIES[scenario.name]
    settings.multi_stream_samples_per_query = STREAMS
    if scenario.name == "server":
        assert scenario.target_qps is not None
        assert scenario.target_ms is not None
        settings.server_target_qps = scenario.target_qps
        settings.server_target_latency_ns = round(scenario.target_ms * 1e6)
    system = _System(session, feeds, most_rows, lg)
    for rows in system.sizes:  # the first run of a shape takes longer
        session.run(system.joined(range(rows)))
    # LoadGen makes as many queries in advance as it expects to need, so the speed that it is given here is higher than the true one.
    settings.single_stream_expected_latency_ns = max(1, round(_HASTE * run_s * 1e9))
    settings.multi_stream_expected_latency_ns = max(1, round(_HASTE * system.duration_s(STREAMS) * 1e9))
    settings.offline_expected_qps = most_rows / system.duration_s(most_rows) / _HASTE
    output = lg.LogOutputSettings()
    folder.mkdir(parents=True, exist_ok=True)
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    logs = lg.LogSettings()
    logs.log_output = output
    logs.enable_trace = False
    answer = system.enqueue if scenario.name == "server" else system.answer
    under_test = lg.ConstructSUT(answer, lambda: None)
    library = lg.ConstructQSL(len(feeds), len(feeds), lambda indices: None, lambda indices: None)
    try:
        with system.working():
            # Otherwise it would read settings from a file in the current folder.
            lg.StartTestWithLogSettings(under_test, library, settings, logs, str(folder / "no-audit.config"))
    finally:
        lg.DestroyQSL(library)
        lg.DestroySUT(under_test)
    if system.error is not None:
        raise system.error
    return read_logs(folder, scenario.name)


def folder_names(candidates: Sequence[tuple[str, str]]) -> list[str]:
    """A folder of logs for each candidate (the path of its artifact, its backend), unlike those of all others.

    `build/net` on `onnxruntime:cuda` -> `net-onnxruntime-cuda`; the second of that name is `net-onnxruntime-cuda-2`.
    """
    bases = [f"{Path(artifact).name}-{backend}".replace(":", "-") for artifact, backend in candidates]
    names: list[str] = []
    for base in bases:
        numbered = (f"{base}-{number}" for number in itertools.count(2))
        names.append(base if base not in names else next(name for name in numbered if name not in (*names, *bases)))
    return names


class _System:
    """LoadGen's system under test. After an error of the session, all further samples are reported as done, so that LoadGen ends."""

    def __init__(self, session: Session, feeds: Sequence[Feed], most_rows: int, lg: Any) -> None:
        self.error: Exception | None = None
        self.sizes = [1 << power for power in range(most_rows.bit_length())]
        """The sizes of batches, each of which is run once before the test."""
        self._session = session
        self._feeds = feeds
        self._lg = lg
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def joined(self, indices: Sequence[int]) -> Feed:
        if len(indices) == 1:
            return self._feeds[indices[0] % len(self._feeds)]
        parts = [self._feeds[index % len(self._feeds)] for index in indices]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def duration_s(self, rows: int) -> float:
        """Seconds that a query of `rows` samples takes: the fastest of three."""
        indices = range(rows)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for part in self._parts(rows):
                self._session.run(self.joined(indices[part]))
            times.append(time.perf_counter() - start)
        return min(times)

    def _parts(self, count: int) -> Iterator[slice]:
        """`count` samples in batches as large as possible."""
        at = 0
        while at < count:
            rows = max(size for size in self.sizes if size <= count - at)
            yield slice(at, at + rows)
            at += rows

    def answer(self, samples: Sequence[Any]) -> None:
        """Run all samples of a query before returning."""
        for part in self._parts(len(samples)):
            self._run(samples[part])

    def enqueue(self, samples: Sequence[Any]) -> None:
        """Queue the samples for the threads of `working`."""
        for sample in samples:
            self._queue.put(sample)

    def _run(self, samples: Sequence[Any]) -> None:
        if self.error is None:
            try:
                self._session.run(self.joined([sample.index for sample in samples]))
            except Exception as error:
                self.error = error
        self._lg.QuerySamplesComplete([self._lg.QuerySampleResponse(sample.id, 0, 0) for sample in samples])

    @contextmanager
    def working(self) -> Iterator[None]:
        """Threads that work on the queue; a None in it ends one of them."""
        threads = [threading.Thread(target=self._work) for _ in range(self._session.concurrency)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for _ in threads:
                self._queue.put(None)
            for thread in threads:
                thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            taken = [first, *self._waiting()]
            self.answer(taken)

    def _waiting(self) -> Iterator[Any]:
        """Samples that are waiting, as many as fit into a batch beside one more."""
        for _ in range(self.sizes[-1] - 1):
            try:
                sample = self._queue.get_nowait()
            except queue.Empty:
                return
            if sample is None:
                self._queue.put(None)
                return
            yield sample


def read_logs(folder: Path, scenario: str) -> Judged:
    """The verdict in the logs that LoadGen wrote to `folder`. Raises BackendError unless they are as its version 6 writes them."""
    entries: dict[str, Any] = {}
    try:
        for line in (folder / _LOGS[1]).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line.partition(" ")[2])
            entries.setdefault(entry["key"], []).append(entry["value"])
        latencies = "per_query_latency" if scenario == "multi-stream" else "latency"
        times = [
            entries[f"result_{percent}_percentile_{latencies}_ns"][-1] / 1e6 for percent in ("50.00", "90.00", "99.00", "99.90")
        ]
        value, unit = _figure(entries, scenario)
        return Judged(
            valid=entries["result_validity"][-1] == "VALID",
            reasons=_reasons(folder / _LOGS[0]),
            value=value,
            unit=unit,
            queries=entries["result_query_count"][-1],
            p50_ms=times[0],
            p90_ms=times[1],
            p99_ms=times[2],
            p999_ms=times[3],
        )
    except (OSError, ValueError, KeyError) as error:
        raise BackendError(f"cannot read LoadGen's logs in {folder}: {type(error).__name__}: {error}") from error


def _figure(entries: dict[str, Any], scenario: str) -> tuple[float, str]:
    if scenario == "offline":
        return float(entries["result_samples_per_second"][-1]), "samples/s"
    if scenario == "server":
        return float(entries["result_completed_samples_per_sec"][-1]), "samples/s"
    percentile = "90.00_percentile_latency" if scenario == "single-stream" else "99.00_percentile_per_query_latency"
    return entries[f"result_{percentile}_ns"][-1] / 1e6, "ms"


def _reasons(summary: Path) -> tuple[str, ...]:
    """From the summary: the conditions that were not met, its advice, and how many queries it would need."""
    lines = summary.read_text(encoding="utf-8").partition("Additional Stats")[0].splitlines()
    unmet = [name.strip() for name, _, answer in (line.partition(":") for line in lines) if answer.strip() == "NO"]
    notes: list[str] = []
    for line in lines:
        if line.startswith(" * "):
            notes.append(line[3:].strip())
        elif line.startswith(" ") and notes:
            notes[-1] += f" {line.strip()}"
    advice = [note.removesuffix(".") for note in notes if not note.startswith(_IDLE_NOTES)]
    return tuple(f"{name.removesuffix(' satisfied').lower()} not satisfied" for name in unmet) + tuple(advice if unmet else ())
