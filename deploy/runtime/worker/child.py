"""The worker process: it opens one session, answers requests, and comes to rest before each reply.

Requests come as JSON lines on standard input, and replies go as JSON lines to the original standard output; output of libraries
and of the user's code goes to standard error. Each reply waits until the process has come to rest, so that thread pools that spin
after a run (ONNX Runtime's, OpenMP's and TBB's do, for up to tens of milliseconds) take no time from the candidate whose turn is
next. This works for every library, unlike settings such as KMP_BLOCKTIME or OMP_WAIT_POLICY, which would also change what is
measured.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.tensors import Feed
from deploy.errors import BackendError, DeployError
from deploy.evidence.timing import sample, settle
from deploy.host.cpu_use import proc_text
from deploy.host.nvidia_smi import gpu_peak_bytes
from deploy.runtime.load import open_session
from deploy.runtime.session import Session, SessionOptions
from deploy.runtime.worker.feeds import random_inputs, total_bytes

SETTLE_S = 1.0
REST_STEP_S = 0.001
REST_STEPS = 3
REST_SHARE = 0.2
REST_LIMIT_S = 3.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Worker:
    """One session at a time, and the feeds that it is timed on in turns."""

    def __init__(self, *, own_process: bool = True) -> None:
        """own_process: whether what its garbage collector does is nobody else's."""
        self._own_process = own_process
        self._opened: tuple[Artifact, Session] | None = None
        self._made: tuple[object, list[Feed]] = None, []
        self._samples: list[Feed] = []
        self._feeds: Iterator[Feed] = iter(())
        self._run_s = 0.0

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Handle one request; the reply."""
        if self._opened is None or request.get("do") == "open":
            self.close()
            options = SessionOptions(**request["options"])
            start = time.perf_counter()
            artifact = open_artifact(request["artifact"])
            self._opened = artifact, open_session(artifact, request["backend"], options)
            return {"load_s": time.perf_counter() - start}
        return self._answer(*self._opened, request)

    def close(self) -> None:
        """Close the session, if one is open."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened, self._samples, self._feeds = None, [], iter(())
            if self._own_process:
                gc.unfreeze()
            gc.collect()

    def _answer(self, artifact: Artifact, session: Session, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to any request but the first."""
        if request["do"] == "prepare":
            feeds = self._make_feeds(artifact, session, request)
            return self._prepare(session, feeds, request["outputs"], request.get("settle_s", SETTLE_S))
        if request["do"] == "memory":
            return {"peak_bytes": peak_bytes(), "gpu_peak_bytes": gpu_peak_bytes()}
        assert request["do"] == "round"
        return self._round(session, request["seconds"], request["most"], request.get("warm_up"))

    def _make_feeds(self, artifact: Artifact, session: Session, request: Mapping[str, Any]) -> list[Feed]:
        """Random feeds; those of the last session, where it had the same inputs."""
        asked = (session.inputs, request["dims"])
        if self._made[0] != asked:
            self._made = asked, random_inputs(session.inputs, request["dims"])
        return self._made[1]

    def _prepare(self, session: Session, feeds: list[Feed], outputs: str | None, settle_s: float) -> dict[str, Any]:
        """Save the outputs on the first feed, and warm up until the time of a run settles, or for `settle_s`."""
        self._samples = feeds
        self._feeds = cycle(feeds)
        start = time.perf_counter()
        results = session.run(feeds[0])
        first_s = time.perf_counter() - start
        if outputs is not None:
            with Path(outputs).open("wb") as file:
                np.savez(file, *results.values())  # by position, because a name may be any text
        del results
        step = self._feeds.__next__
        self._run_s = settle(lambda: session.run(step()), limit_s=settle_s, first_s=first_s)
        gc.collect()
        if self._own_process:
            gc.freeze()
        return {"run_s": self._run_s, "first_s": first_s, "input_bytes": total_bytes(feeds), "inputs": len(feeds)}

    def _round(self, session: Session, seconds: float, most: int, warm_up: bool | None) -> dict[str, Any]:
        """Samples of one round, in seconds.

        The first tenth of the round, at least one run, is not timed, because the caches still hold another candidate's data. A
        model that fits only one run into a round is timed at once. warm_up: None for that rule; else whether there is such a tenth.
        """
        run, step = session.run, self._feeds.__next__
        collects = gc.isenabled()
        gc.disable()  # as timeit does
        try:
            if self._run_s < seconds if warm_up is None else warm_up:
                sample(lambda: run(step()), seconds / 10)
            return {"samples_s": sample(lambda: run(step()), seconds, most)}
        finally:
            if collects:
                gc.enable()


def peak_bytes() -> int:
    """The peak memory of this process in bytes: VmHWM in proc(5)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def rest() -> None:
    """Wait until no thread of this process runs or wants to. Raises BackendError if that does not happen in time.

    It checks processor time and thread states, because neither is enough by itself: other programs may keep a spinning thread from
    the processor, so that it uses no time, and a thread that waits for Python's lock does not count as runnable.
    """
    start = time.perf_counter()
    quiet = 0
    while time.perf_counter() - start < REST_LIMIT_S:
        before, used = time.perf_counter(), time.process_time()
        time.sleep(REST_STEP_S)
        share = (time.process_time() - used) / (time.perf_counter() - before)
        quiet = quiet + 1 if share < REST_SHARE and not _runnable() else 0
        if quiet == REST_STEPS:
            return
    raise BackendError(f"threads still spin {REST_LIMIT_S:g} s after a run: what is measured next would be slowed down")


def _runnable() -> bool:
    """Whether a thread other than this one is running or ready to run: state R in proc(5)."""
    own = str(threading.get_native_id())
    for task in os.listdir("/proc/self/task"):
        if task != own:
            with contextlib.suppress(OSError):  # it has just ended
                if proc_text(f"/proc/self/task/{task}/stat").rpartition(")")[2].split()[0] == "R":
                    return True
    return False


def die_with(parent: int) -> None:
    """Have this process killed when the process `parent`, which started it, ends in any way.

    Otherwise it would live on: it notices the end of the pipe only after a request, and a first run may take minutes.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def main(parent: int, opened: str, worker: Worker | None = None) -> None:
    """Open the session that the JSON text `opened` describes, then answer requests until standard input ends.

    An error is also a reply. parent: the process that sends the requests; this one dies with it. worker: handles the requests, a
    `Worker` by default.
    """
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = worker or Worker()
    for line in chain([opened], sys.stdin):
        try:
            reply = worker.handle(json.loads(line))
            rest()
        except Exception as error:
            traceback.print_exc()
            kind = type(error).__name__
            message = str(error) if isinstance(error, DeployError) else f"{kind}: {error}"
            reply = {"error": kind if isinstance(error, DeployError) else "BackendError", "message": message}
        print(json.dumps(reply), file=replies, flush=True)
    os._exit(0)  # libraries with threads may hang while the interpreter shuts down
