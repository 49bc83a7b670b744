"""Every backend is used from 16 threads at once, each thread with its own inputs, shapes and expected results."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.errors import SessionClosedError
from deploy.runtime.load import open_session
from deploy.runtime.session import Session

THREADS = 16


def images(thread: int, batch: int) -> np.ndarray:
    return np.random.default_rng(thread).standard_normal((batch, 1, 28, 28), dtype=np.float32)


def in_threads(work: Callable[[int], None]) -> None:
    barrier = Barrier(THREADS)

    def start(thread: int) -> None:
        barrier.wait()
        work(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(start, thread) for thread in range(THREADS)]:
            future.result()


@pytest.mark.parametrize(
    ("backend", "runs"), [("onnxruntime", 40), ("openvino", 40), ("eager", 20), ("compile", 100), ("aoti", 40)]
)
def test_sixteen_threads_each_get_their_own_results(shared_lenet5: Artifact, package: Artifact, backend: str, runs: int) -> None:
    with open_session(shared_lenet5, "onnxruntime") as reference:
        expected = [reference(images(thread, 1 + thread % 3)) for thread in range(THREADS)]
    with open_session(package if backend == "aoti" else shared_lenet5, backend) as session:

        def work(thread: int) -> None:
            x = images(thread, 1 + thread % 3)
            results = [session(x) for _ in range(runs)]
            for result in results:  # compared after all runs: a result must not change once it is handed out
                np.testing.assert_allclose(result, expected[thread], rtol=0, atol=1e-5)

        in_threads(work)


def test_sixteen_threads_on_the_null_backend(shared_lenet5: Artifact) -> None:
    with open_session(shared_lenet5, "null") as session:

        def work(thread: int) -> None:
            for _ in range(40):
                assert session(images(thread, 1 + thread)).shape == (1 + thread, 10)

        in_threads(work)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager", "aoti"])
def test_closing_while_runs_are_under_way_lets_them_finish(shared_lenet5: Artifact, package: Artifact, backend: str) -> None:
    x = images(0, 8)
    with open_session(shared_lenet5, "onnxruntime") as reference:
        expected = reference(x)
    session: Session = open_session(package if backend == "aoti" else shared_lenet5, backend)
    closed = 0

    def work(thread: int) -> None:
        nonlocal closed
        for turn in range(200):
            if thread == 0 and turn == 10:
                session.close()
            try:
                np.testing.assert_allclose(session(x), expected, rtol=0, atol=1e-5)
            except SessionClosedError:
                closed += 1
                return

    in_threads(work)
    assert closed == THREADS


AFFINITIES = """
import contextlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np

import deploy

seen = set()
stop = Event()
x = np.random.default_rng(0).standard_normal((64, 1, 28, 28), dtype=np.float32)
with deploy.load(sys.argv[1], sys.argv[2]) as session, ThreadPoolExecutor(1) as pool:

    def run():
        while not stop.is_set():
            session(x)

    future = pool.submit(run)
    for _ in range(50):
        time.sleep(0.004)
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # it has ended
                seen.add(frozenset(os.sched_getaffinity(int(task))))
    stop.set()
    future.result()
print(json.dumps([sorted(cores) for cores in seen]))
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_threads_are_not_tied_to_cores(shared_lenet5: Artifact, backend: str) -> None:
    """Else the sessions of two processes would share a core while others are idle.

    In a process of its own: other libraries that earlier tests used may have tied their threads in this one.
    """
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    command = [sys.executable, "-c", AFFINITIES, str(shared_lenet5.path), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [sorted(allowed)]
