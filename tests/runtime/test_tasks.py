import threading

import pytest

from deploy.errors import SessionError
from deploy.runtime.tasks import RunFuture, TaskPool

WAIT_S = 20


def test_tasks_are_done_in_order_and_errors_are_the_futures() -> None:
    pool, seen = TaskPool(1, "test"), []
    futures = [pool.submit(seen.append, number) for number in range(5)]
    wrong = pool.submit(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        wrong.result(WAIT_S)
    assert seen == [0, 1, 2, 3, 4]
    assert all(future.done() for future in futures)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(int)


def test_no_more_run_at_a_time_than_there_are_workers() -> None:
    pool, both = TaskPool(2, "test"), threading.Barrier(2)
    inside, most = [], []

    def task() -> None:
        inside.append(None)
        both.wait(WAIT_S)
        most.append(len(inside))
        both.wait(WAIT_S)
        inside.pop()

    for future in [pool.submit(task) for _ in range(6)]:
        future.result(WAIT_S)
    assert max(most) == 2
    pool.shutdown()


def test_shutdown_does_what_waits_unless_it_cancels_it() -> None:
    for cancel in (False, True):
        pool, gate = TaskPool(1, "test"), threading.Event()
        first, second = pool.submit(gate.wait, WAIT_S), pool.submit(int)
        while not first.running():
            pass
        pool.shutdown(wait=False, cancel_futures=cancel)
        gate.set()
        pool.shutdown()
        assert first.result(WAIT_S)
        assert second.cancelled() is cancel
        assert cancel or second.result(WAIT_S) == 0


def test_a_pool_that_is_dropped_leaves_no_threads() -> None:
    pool = TaskPool(2, "dropped pool")
    pool.submit(int).result(WAIT_S)
    threads = [thread for thread in threading.enumerate() if thread.name == "dropped pool"]
    assert len(threads) == 2
    del pool
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_in_a_child_a_future_fails_unless_it_was_done(state: str) -> None:
    done, open_, called = RunFuture[int](), RunFuture[int](), []
    done.set_result(3)
    if state == "running":
        open_.set_running_or_notify_cancel()
    open_.add_done_callback(called.append)
    with done._condition, open_._condition:  # as another thread may hold them at the moment of the fork
        done._forked()
        open_._forked()
    assert done.result(WAIT_S) == 3
    with pytest.raises(SessionError, match="ask again in the child"):
        open_.result(WAIT_S)
    assert called == []  # those who ask in the parent are answered there
