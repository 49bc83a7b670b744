"""Batches of real sessions: whose rows come back to whom, and what waits, is late, cancelled or refused."""

import asyncio
import threading
import time
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError, DeadlineError, InputError, QueueFullError, SessionClosedError, UsageError
from deploy.runtime.batching.batcher import Batcher, BatcherOptions
from deploy.runtime.batching.queue import BatchRecord
from deploy.runtime.load import open_session

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


def test_rows_are_counted_and_everyone_gets_their_own(session: Any) -> None:
    with Batcher(session, BatcherOptions(max_rows=8)) as batcher:
        first = hold(session, batcher)
        feeds = [images(rows, seed) for seed, rows in enumerate((3, 2, 3, 1, 8, 2))]
        futures = [batcher.submit(feed) for feed in feeds]
        assert batcher.waiting == 6
        session.gate.set()
        results = [future.result(WAIT_S) for future in futures]
        assert first.result(WAIT_S)["logits"].shape == (1, 10)
    assert session.rows == [1, 8, 1, 8, 2]  # in order; 1 and 8 do not go together
    assert all(same(session, feed, result) for feed, result in zip(feeds, results, strict=True))
    assert results[0]["logits"].base is None  # not a view on what others got


def test_many_threads_get_their_own_answers(session: Any) -> None:
    wrong: list[int] = []
    with Batcher(session, BatcherOptions(max_rows=16, delay_ms=0.2)) as batcher:

        def client(number: int) -> None:
            for turn in range(40):
                feed = images(1 + (number + turn) % 5, 100 * number + turn)
                if not same(session, feed, batcher.run(feed)):
                    wrong.append(number)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert not wrong
    assert len(session.rows) < 8 * 40


def test_a_batch_waits_for_others_as_long_as_it_may_and_no_longer(session: Any) -> None:
    with Batcher(session, BatcherOptions(max_rows=4, delay_ms=300)) as batcher:
        start = time.perf_counter()
        futures = [batcher.submit(images(2, 1)), batcher.submit(images(2, 2))]
        wait(futures, WAIT_S)
        assert time.perf_counter() - start < 0.25  # full: it goes at once
        start = time.perf_counter()
        batcher.run(images(1, 3))
        assert 0.28 < time.perf_counter() - start < 2
    assert session.rows == [4, 1]


def test_priority_goes_first_and_order_is_kept_within_one(session: Any) -> None:
    done: list[int] = []
    with Batcher(session, BatcherOptions(max_rows=1)) as batcher:
        hold(session, batcher)
        for number, priority in enumerate((5, 1, 5, 2, 1)):
            batcher.submit(images(1, number), priority=priority).add_done_callback(lambda _, number=number: done.append(number))
        session.gate.set()
    assert done == [1, 4, 3, 0, 2]


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(session: Any) -> None:
    with Batcher(session, BatcherOptions(max_rows=4, queue_rows=6)) as batcher:
        hold(session, batcher)
        waiting = [batcher.submit(images(3, seed)) for seed in range(2)]
        with pytest.raises(QueueFullError, match="the queue of 'lenet5' is full: 6 rows wait, 6 may"):
            batcher.submit(images(1, 3))
        assert waiting[0].cancel()
        assert batcher.waiting == 1
        third = batcher.submit(images(3, 4))
        session.gate.set()
        assert third.result(WAIT_S)["logits"].shape == (3, 10)
        with pytest.raises(CancelledError):
            waiting[0].result(WAIT_S)
    assert session.rows[1:] == [3, 3]  # nothing was computed for the cancelled one


def test_what_is_too_late_is_not_run(session: Any) -> None:
    with Batcher(session, BatcherOptions(max_rows=4)) as batcher:
        hold(session, batcher)
        late, patient = batcher.submit(images(1, 1), timeout_s=0.05), batcher.submit(images(1, 2), timeout_s=WAIT_S)
        time.sleep(0.1)
        session.gate.set()
        with pytest.raises(DeadlineError, match=r"not begun within its 0.05 s"):
            late.result(WAIT_S)
        assert patient.result(WAIT_S)
    assert session.rows == [1, 1]


def test_a_feed_that_does_not_fit_is_refused_before_it_is_queued(session: Any) -> None:
    with Batcher(session, BatcherOptions(max_rows=4)) as batcher:
        for feed, message in (
            ({"input": np.zeros((1, 1, 28, 27), np.float32)}, "1x1x28x27"),
            ({"input": np.zeros((1, 1, 28, 28))}, "float64"),
            ({"x": np.zeros((1, 1, 28, 28), np.float32)}, "missing input"),
            (images(5, 0), "5 rows in one request; a batch of 'lenet5' has 4 at most"),
        ):
            with pytest.raises(InputError, match=message):
                batcher.submit(feed)
        with pytest.raises(UsageError, match="`priority` must be 1"):
            batcher.submit(images(1, 0), priority=0)
    assert session.rows == []


def test_closing_drains_or_fails_what_waits_and_refuses_what_comes(session: Any) -> None:
    batcher = Batcher(session, BatcherOptions(max_rows=1))
    hold(session, batcher)
    waiting = [batcher.submit(images(1, seed)) for seed in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while True:
        try:
            waiting.append(batcher.submit(images(1, 9)))
        except SessionClosedError:
            break
    session.gate.set()
    closing.join(WAIT_S)
    assert all(future.result(0)["logits"].shape == (1, 10) for future in waiting)

    batcher = Batcher(session, BatcherOptions(max_rows=1))
    first = hold(session, batcher)
    lost = batcher.submit(images(1, 1))
    threading.Timer(0.1, session.gate.set).start()
    batcher.close(drain=False)
    assert first.result(0)
    with pytest.raises(SessionClosedError):
        lost.result(0)


def test_asyncio_tasks_get_their_own_and_cancelled_ones_leave_the_queue(session: Any) -> None:
    async def main(batcher: Batcher) -> None:
        feeds = [images(1 + seed % 3, seed) for seed in range(30)]
        results = await asyncio.gather(*(batcher.run_async(feed) for feed in feeds))
        assert all(same(session, feed, result) for feed, result in zip(feeds, results, strict=True))
        hold(session, batcher)
        task = asyncio.create_task(batcher.run_async(images(2, 1)))
        while batcher.waiting == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert batcher.waiting == 0
        session.gate.set()
        with pytest.raises(InputError):
            await batcher.run_async({"input": np.zeros(3, np.float32)})

    with Batcher(session, BatcherOptions(max_rows=8)) as batcher:
        asyncio.run(main(batcher))


def test_a_loop_that_ends_before_its_answers_harms_nobody(session: Any) -> None:
    async def leave(batcher: Batcher) -> None:
        hold(session, batcher)
        asyncio.get_running_loop().create_task(batcher.run_async(images(1, 1)))
        await asyncio.sleep(0.01)

    with Batcher(session) as batcher:
        asyncio.run(leave(batcher))
        session.gate.set()
        assert batcher.run(images(1, 2), timeout_s=WAIT_S)


def test_several_instances_run_at_a_time(session: Any) -> None:
    with Batcher(session, BatcherOptions(max_rows=1, instances=3)) as batcher:
        session.gate.clear()
        futures = [batcher.submit(images(1, seed)) for seed in range(5)]
        for _ in range(3):
            assert session.inside.acquire(timeout=WAIT_S)
        assert not session.inside.acquire(timeout=0.05)
        session.gate.set()
        assert all(future.result(WAIT_S) for future in futures)


def test_closing_ends_all_threads_of_many_instances(session: Any) -> None:
    batcher = Batcher(session, BatcherOptions(max_rows=1, instances=4))
    session.gate.clear()
    futures = [batcher.submit(images(1, seed)) for seed in range(7)]
    threading.Timer(0.1, session.gate.set).start()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert all(future.done() for future in futures)


def test_a_small_model_is_run_in_the_event_loop_and_a_large_one_is_not(session: Any) -> None:
    where: list[str] = []
    run = session.run

    def noted(feed: Any) -> Any:
        where.append(threading.current_thread().name)
        return run(feed)

    session.run = noted
    seen: list[BatchRecord] = []

    async def main(batcher: Batcher) -> None:
        feeds = [images(1, seed) for seed in range(200)]
        for feed in feeds:
            assert same(session, feed, await batcher.run_async(feed))
        assert where[0] != "MainThread"
        assert where[-1] == "MainThread"  # by now it is known to be small
        bad = images(1, 1)
        bad["input"][0, 0, 0, 0] = 666
        with pytest.raises(BackendError, match="a cosmic ray"):
            await batcher.run_async(bad)
        hold(session, batcher)  # the session is not free: nothing runs in the loop
        waiting = asyncio.create_task(batcher.run_async(feeds[0]))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        session.gate.set()
        await waiting
        assert where[-1] != "MainThread"

    with Batcher(session, observe=seen.append) as batcher:
        asyncio.run(main(batcher))
    assert len(seen) == 203
    slow = Batcher(session)
    slow._alone_s = 1.0
    with slow:
        asyncio.run(slow.run_async(images(1, 1)))
    assert where[-1] != "MainThread"


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return deploy.export(tmp_path_factory.mktemp("static") / "lenet5", arch="lenet5", static_batch=True)


def test_a_model_with_a_fixed_batch_takes_each_request_alone(static: Artifact) -> None:
    with open_session(static, "onnxruntime") as session, Batcher(session) as batcher:
        assert batcher.max_rows is None
        futures = [batcher.submit(images(1, seed)) for seed in range(5)]
        assert all(future.result(WAIT_S)["logits"].shape == (1, 10) for future in futures)


def test_rows_of_a_batch_come_from_the_profile_unless_said(shared_lenet5: Artifact) -> None:
    with open_session(shared_lenet5, "onnxruntime") as session:
        profiles = session.profiles
        assert profiles
        most = profiles[0]["input"].max[0]
        with Batcher(session) as batcher:
            assert batcher.max_rows == most
        with pytest.raises(UsageError, match=f"take {most} rows at most"):
            Batcher(session, BatcherOptions(max_rows=most + 1))


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"queue_rows": 0}, {"instances": 0}, {"delay_ms": -1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be"):
        BatcherOptions(**options)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("drain", [True, False])
def test_a_session_that_is_closed_under_a_batcher_fails_what_waits_and_nothing_hangs(session: Any, drain: bool) -> None:
    batcher = Batcher(session, BatcherOptions(max_rows=2))
    held = hold(session, batcher)
    futures = [batcher.submit(images(2, seed)) for seed in range(3)]
    session._session.close()
    session.gate.set()
    batcher.close(drain=drain)
    assert all(isinstance(future.exception(WAIT_S), SessionClosedError) for future in (held, *futures))
    with pytest.raises(SessionClosedError):
        batcher.submit(images(1, 0))
