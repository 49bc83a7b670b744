"""What `gpu_report.py` does before it measures: exports, compilations and builds, many at a time, each in its own process.

A job leaves a file, so that it is not done again: its seconds, or why it failed. Compiled code is left in torch's cache on disk.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_candidates import COMPILE, FLAVOURS, Candidate, candidates
from gpu_setting import Setting, make_aoti, make_engine, make_half, make_source

from deploy.artifact.tensors import random_feed
from deploy.host.cpu import usable_cores

POLL_S = 0.05
TUNING_AT_A_TIME = 2
"""Each compiles many kernels at a time."""
RUNS = 3
"""The runs of compiled code that compile, warm up and record it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to make. needs: the name of another job. tunes: it times kernels on the GPU, and wants the machine alone."""

    name: str
    needs: str | None = None
    tunes: bool = False


def jobs_for(setting: Setting, models: Sequence[str], kinds: Sequence[str]) -> list[Job]:
    """The jobs of the candidates of `models`, in the order of `models`, and those of all batches in the order of candidates."""
    found: dict[str, Job] = {}
    for model in models:
        export = f"export/{model}"
        found[export] = Job(name=export)
        for candidate in candidates(model, kinds, autotune=setting.autotune):
            for batch in setting.batches:
                for name in candidate.jobs(model, batch):
                    tunes = name.startswith(("autotune/", *FLAVOURS)) or candidate.max_autotune
                    found[name] = Job(name=name, needs=export, tunes=tunes)
    return list(found.values())


def do_job(setting: Setting, name: str) -> dict[str, Any]:
    """Do a job here and return its figures. name: KIND/MODEL, or KIND/MODEL/BATCH or PRECISION. May raise anything."""
    start = time.perf_counter()
    kind, model, *rest = name.split("/")
    figures: dict[str, Any] = {}
    if kind == "export":
        make_source(setting, model)
    elif kind == "fp16":
        make_half(setting, model)
    elif kind in ("compile", "autotune"):
        for candidate in COMPILE:
            if (kind == "autotune") == candidate.tuned:
                _compile(setting, candidate, model, int(rest[0]))
    elif kind == "aoti":
        make_aoti(setting, model, rest[0], max_autotune="autotune" in rest)
    else:
        figures["build_s"] = make_engine(setting, kind, model, rest[0])
    return {"seconds": round(time.perf_counter() - start, 1), **figures}


def _compile(setting: Setting, candidate: Candidate, model: str, batch: int) -> None:
    with candidate.open(setting, model) as session, setting.stream():
        feed = random_feed(session.inputs, {"batch": batch})
        for _ in range(RUNS):
            session.run(feed)


def outcome_file(setting: Setting, name: str) -> Path:
    return setting.work / "jobs" / f"{name.replace('/', '-')}.json"


def outcome(setting: Setting, name: str) -> dict[str, Any] | None:
    """What a job left: `seconds` and its figures, or `error`; None if it was not done."""
    path = outcome_file(setting, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def keep_outcome(setting: Setting, name: str, found: Mapping[str, Any]) -> None:
    path = outcome_file(setting, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


def not_done(setting: Setting, candidate: Candidate, model: str, batch: int) -> str | None:
    """Why a candidate cannot be measured: a job that it needs failed, or was not done. None if it can be."""
    for name in candidate.jobs(model, batch) if not setting.dry else ():
        found = outcome(setting, name)
        if found is None:
            return f"{name} was not done"
        if "error" in found:
            return f"{name}: {found['error']}"
    return None


def environment(setting: Setting, threads: int) -> dict[str, str]:
    """The environment of a process that shares torch's caches. threads: those that compile kernels, and compute on the CPU."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(setting.work.resolve() / "inductor"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    caches["PYTHONFAULTHANDLER"] = "1"  # a process that crashes leaves the lines that it was at
    return {**os.environ, **caches, "TORCHINDUCTOR_COMPILE_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}


@dataclass
class Child:
    """A process of its own session, with its output in a file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    tunes: bool = False
    ended: bool = False
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, *, tunes: bool = False
    ) -> "Child":
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        return cls(name=name, process=process, log=log, tunes=tunes)

    def end(self) -> None:
        """End it and all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.ended = True

    @property
    def crashed(self) -> bool:
        """Whether a signal ended it that was not ours."""
        return not self.ended and (self.process.returncode or 0) < 0

    def reason(self) -> str:
        """The last line that it printed, or how it ended; of a crash, the signal, and where its threads were is in the log."""
        if self.process.returncode < 0:
            return f"it crashed ({signal.Signals(-self.process.returncode).name}), see {self.log}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), f"exit status {self.process.returncode}")

    def wait(self, limit_s: float) -> str | None:
        """Wait for it; what went wrong, or None. It is ended `limit_s` seconds after its start."""
        try:
            status = self.process.wait(max(self.started + limit_s - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self.end()
            return f"it took more than {limit_s:.0f} s"
        return self.reason() if status else None


def run_jobs(
    jobs: Sequence[Job],
    start: Callable[[Job], Child],
    *,
    at_a_time: int,
    limit_s: float,
    until: float | None = None,
    together: bool = False,
) -> dict[str, str]:
    """Do all jobs, in this order where they can; why those failed that did, by name.

    limit_s: the seconds of one job. until: the time (`time.monotonic`) at which those that are not done are given up.
    together: tuning jobs run beside others too, and not alone.
    """
    waiting = {job.name: job for job in jobs}
    running: dict[str, Child] = {}
    failed: dict[str, str] = {}
    while waiting or running:
        now = time.monotonic()
        for name, child in list(running.items()):
            if child.process.poll() is not None or now - child.started >= limit_s:
                if reason := child.wait(limit_s):
                    failed[name] = reason
                del running[name]
        if until is not None and now > until:
            failed |= dict.fromkeys([*running, *waiting], "the time to prepare was over")
            for child in running.values():
                child.end()
            break
        for job in list(waiting.values()):
            if job.needs in failed:
                failed[job.name] = f"{job.needs} failed: {failed[job.needs]}"
                del waiting[job.name]
            elif job.needs not in waiting and job.needs not in running and _fits(job, running, at_a_time, together=together):
                running[job.name] = start(job)
                del waiting[job.name]
        time.sleep(POLL_S)
    return failed


def _fits(job: Job, running: Mapping[str, Child], at_a_time: int, *, together: bool) -> bool:
    tuning = sum(child.tunes for child in running.values())
    if job.tunes and tuning >= TUNING_AT_A_TIME:
        return False
    if not together and (tuning or (job.tunes and running)):
        return False
    return len(running) < at_a_time


def compile_threads(job: Job) -> int:
    """The threads that compile kernels for a job: a tuning job tries many of them."""
    return max(2, usable_cores() // TUNING_AT_A_TIME) if job.tunes else 2
