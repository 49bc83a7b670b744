import threading

import pytest

from deploy.artifact import Artifact
from deploy.bench import worker
from deploy.bench.worker import Worker, rest
from deploy.errors import BackendError


def test_rest_waits_for_threads_that_spin_and_says_so_when_they_never_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REST_LIMIT_S", 0.2)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        with pytest.raises(BackendError, match=r"threads still spin 0.2 s after a run"):
            rest()
        monkeypatch.setattr(worker, "REST_LIMIT_S", 30.0)
        threading.Timer(0.2, stop.set).start()
        rest()
        assert stop.is_set()
    finally:
        stop.set()
        thread.join()


def test_a_batch_is_set_only_where_the_model_has_one(shared_lenet5: Artifact) -> None:
    mine = Worker()
    mine.handle({"artifact": str(shared_lenet5.path), "backend": "null", "options": {"device": "cpu"}})
    mine.handle({"do": "prepare", "batch": None, "outputs": None})
    assert mine._feed["input"].shape[0] == 8  # the optimum of the first profile
    mine.handle({"do": "prepare", "batch": 5, "outputs": None})
    assert mine._feed["input"].shape[0] == 5
