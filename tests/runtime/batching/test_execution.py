"""The run of one batch: who is answered with what when something fails, and what is observed."""

import time
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest

from deploy.errors import BackendError
from deploy.runtime.batching.batcher import Batcher, BatcherOptions
from deploy.runtime.batching.queue import BatchRecord

WAIT_S = 20


def images(rows: int, seed: int) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(seed).standard_normal((rows, 1, 28, 28), dtype=np.float32)}


def hold(session: Any, batcher: Batcher) -> Future[Any]:
    """A request that stays in the session until the gate opens, so that what follows waits."""
    session.gate.clear()
    while session.inside.acquire(blocking=False):
        pass  # of runs before
    future = batcher.submit(images(1, 1000))
    assert session.inside.acquire(timeout=WAIT_S)
    return future


def same(session: Any, feed: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> bool:
    expected = session._session.run(feed)["logits"]
    return bool(outputs["logits"].shape == expected.shape and np.abs(outputs["logits"] - expected).max() < 1e-5)


def test_one_bad_request_fails_alone(session: Any) -> None:
    with Batcher(session, BatcherOptions(max_rows=8)) as batcher:
        hold(session, batcher)
        feeds = [images(2, seed) for seed in range(4)]
        feeds[2]["input"][1, 0, 0, 0] = 666
        futures = [batcher.submit(feed) for feed in feeds]
        session.gate.set()
        for number, (feed, future) in enumerate(zip(feeds, futures, strict=True)):
            if number == 2:
                with pytest.raises(BackendError, match="running 'lenet5' failed: RuntimeError: a cosmic ray"):
                    future.result(WAIT_S)
            else:
                assert same(session, feed, future.result(WAIT_S))
        assert same(session, feeds[0], batcher.run(feeds[0]))  # and it goes on


def test_every_batch_is_observed_with_its_times(session: Any) -> None:
    seen: list[BatchRecord] = []
    with Batcher(session, BatcherOptions(max_rows=8), observe=seen.append) as batcher:
        hold(session, batcher)
        futures = [batcher.submit(images(2, seed)) for seed in range(3)]
        time.sleep(0.05)
        session.gate.set()
        wait(futures, WAIT_S)
    assert [record.rows for record in seen] == [1, 6]
    assert seen[0].infer_s > 0.05
    assert all(0.04 < waited < 5 for waited in seen[1].queue_s)
    assert all(total >= waited for total, waited in zip(seen[1].total_s, seen[1].queue_s, strict=True))
    assert seen[1].error is None


def test_an_observer_that_fails_stops_nothing(session: Any, caplog: pytest.LogCaptureFixture) -> None:
    def observe(record: BatchRecord) -> None:
        raise ValueError("no room for figures")

    with Batcher(session, observe=observe) as batcher:
        assert [same(session, images(2, seed), batcher.run(images(2, seed), timeout_s=WAIT_S)) for seed in range(5)] == [True] * 5
    assert "what observes the batches of 'lenet5' failed" in caplog.text


def test_outputs_with_fewer_rows_than_were_fed_fail_all_and_nobody_waits_for_ever(session: Any) -> None:
    run = session.run
    session.run = lambda feed: {name: array[:0].sum(axis=0) for name, array in run(feed).items()}  # no rows at all
    with Batcher(session, BatcherOptions(max_rows=8)) as batcher:
        hold(session, batcher)
        futures = [batcher.submit(images(2, seed)) for seed in range(3)]
        session.gate.set()
        for future in futures:
            with pytest.raises(BackendError, match="gave 10 rows for 6"):
                future.result(WAIT_S)
