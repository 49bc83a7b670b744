"""The process that one candidate runs in: opens one session, and works only when told to.

Requests come as JSON lines on standard input, replies go as JSON lines to what was standard output; whatever libraries
or the user's code print goes to standard error. Each reply waits until the process has come to rest, so that thread
pools that spin after a run (ONNX Runtime's, OpenMP's and TBB's do, for up to tens of milliseconds) do not take time
from the candidate whose turn is next. That needs no knowledge of the libraries and is therefore not left to settings
such as KMP_BLOCKTIME or OMP_WAIT_POLICY, which would also change what is measured.
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
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from deploy.errors import BackendError, DeployError
from deploy.opening import open_artifact
from deploy.runtime.session import Session, SessionOptions, open_session
from deploy.tensors import random_feed
from deploy.timing import sample, settle

SETTLE_S = 1.0
REST_STEP_S = 0.002
REST_STEPS = 3
REST_SHARE = 0.2
REST_LIMIT_S = 3.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Worker:
    """One session, and the feed that it is timed on."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._feed: dict[str, np.ndarray] = {}
        self._run_s = 0.0

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what one request asks; the reply."""
        if self._session is None:  # the first request
            options = SessionOptions(**request["options"])
            self._session = open_session(open_artifact(request["artifact"]), request["backend"], options)
            return {}
        if request["do"] == "prepare":
            return self._prepare(self._session, request["dims"], request["outputs"])
        assert request["do"] == "round"
        return self._round(self._session, request["seconds"], request["most"])

    def _prepare(self, session: Session, dims: dict[str, int], outputs: str | None) -> dict[str, Any]:
        """Make the random feed of these sizes, save what comes of it, and warm up until the time settles."""
        try:
            self._feed = random_feed(session.inputs, dims)
        except MemoryError as error:
            sizes = ", ".join(f"{name} {size}" for name, size in dims.items())
            raise BackendError(f"no memory for an input with {sizes}: {error}") from error
        results = session.run(self._feed)
        if outputs is not None:
            with Path(outputs).open("wb") as file:
                np.savez(file, *results.values())  # by position: a name may be anything
        del results
        self._run_s = settle(lambda: session.run(self._feed), limit_s=SETTLE_S)
        gc.collect()
        gc.freeze()
        return {"run_s": self._run_s}

    def _round(self, session: Session, seconds: float, most: int) -> dict[str, Any]:
        """Samples of one round, in seconds.

        The first tenth of it is not timed, one run at least, for the caches are another candidate's; a model of which a
        round holds but a single run is timed at once.
        """
        run, feed = session.run, self._feed
        gc.disable()  # as timeit does
        try:
            if self._run_s < seconds:
                sample(lambda: run(feed), seconds / 10)
            return {"samples_s": sample(lambda: run(feed), seconds, most)}
        finally:
            gc.enable()


def rest() -> None:
    """Wait until no thread of this process runs or wants to. Raises BackendError when that never comes.

    Neither sign is enough by itself: a thread that spins may be kept from the processor by other programs and use no
    time, and one that waits for Python's lock is not seen as runnable.
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
    for task in Path("/proc/self/task").iterdir():
        if task.name != own:
            with contextlib.suppress(OSError):  # it has just ended
                if (task / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"R":
                    return True
    return False


def die_with(parent: int) -> None:
    """Have this process killed when the process `parent`, which started it, ends in whatever way.

    It would else live on: it reads the end of the pipe only when it is done, and a first run may take minutes.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def main(parent: int, opened: str) -> None:
    """Open the session that the JSON text `opened` describes, then obey requests until standard input ends.

    An error is a reply too. `parent`: the process to obey, and to die with.
    """
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the parent decides
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
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
    os._exit(0)  # libraries with threads of their own may hang while the interpreter ends
