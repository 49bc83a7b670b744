"""The process of a worker: it rests before it replies, and ends with its parent."""

import os
import subprocess
import sys
import threading

import pytest

from deploy.errors import BackendError
from deploy.runtime.worker import child
from deploy.runtime.worker.child import rest


def test_rest_waits_for_threads_that_spin_and_says_so_when_they_never_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "REST_LIMIT_S", 0.2)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        with pytest.raises(BackendError, match=r"threads still spin 0.2 s after a run"):
            rest()
        monkeypatch.setattr(child, "REST_LIMIT_S", 30.0)
        threading.Timer(0.2, stop.set).start()
        rest()
        assert stop.is_set()
    finally:
        stop.set()
        thread.join()


def test_a_worker_whose_parent_is_gone_already_ends() -> None:
    code = "import sys; from deploy.runtime.worker.child import main; main(int(sys.argv[1]), '')"
    done = subprocess.run([sys.executable, "-c", code, str(os.getppid())], input="", timeout=60)
    assert done.returncode == 1
