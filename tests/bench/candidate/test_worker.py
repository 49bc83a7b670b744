import threading

import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.bench.candidate.worker import CandidateWorker
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


@pytest.fixture
def mine(shared_lenet5: Artifact) -> CandidateWorker:
    opened = CandidateWorker()
    opened.handle({"artifact": str(shared_lenet5.path), "backend": "null", "options": {"device": "cpu"}})
    return opened


def test_the_feed_has_the_sizes_asked_for(mine: CandidateWorker) -> None:
    mine.handle({"do": "prepare", "dims": {"batch": 5}, "outputs": None, "data": None})
    first, second = next(mine._feeds), next(mine._feeds)
    assert first["input"].shape == second["input"].shape == (5, 1, 28, 28)
    assert not np.array_equal(first["input"], second["input"])


def test_a_batch_beyond_the_memory_is_an_error_with_its_size(mine: CandidateWorker) -> None:
    with pytest.raises(BackendError, match=r"no memory for an input with batch 1000000000000: Unable to allocate 2.79 PiB"):
        mine.handle({"do": "prepare", "dims": {"batch": 10**12}, "outputs": None, "data": None})
