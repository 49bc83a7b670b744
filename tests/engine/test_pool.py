"""The contexts of an engine, borrowed by runs, parked by streams and closed at the end; they stand for real ones here."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deploy.engine.cuda import DeviceLostError, DeviceMemoryError
from deploy.engine.pool import ContextPool
from deploy.errors import BackendError

WAIT_S = 20.0


class EndedError(Exception):
    """What the pool raises after `stop`."""


class Context:
    def __init__(self) -> None:
        self.settled = self.closed = 0
        self.lost: DeviceLostError | None = None

    def settle(self) -> None:
        self.settled += 1

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def make_pool() -> Callable[[int], Any]:
    return lambda most: ContextPool(Context, most, EndedError)  # type: ignore[arg-type]


def test_contexts_are_made_when_they_are_needed_and_no_more_than_allowed(make_pool: Callable[[int], Any]) -> None:
    pool = make_pool(2)
    first = pool.borrow()
    pool.give_back(first)
    assert pool.borrow() is first
    second = pool.borrow_free()
    assert second is not first
    assert pool.borrow_free() is None
    assert pool.made == [first, second]


def test_who_waits_for_a_context_gets_the_next_that_is_given_back(make_pool: Callable[[int], Any]) -> None:
    pool = make_pool(1)
    context = pool.borrow()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.borrow)
        while not pool._waiting:
            time.sleep(0.001)
        assert not waiting.done()
        pool.give_back(context)
        assert waiting.result(WAIT_S) is context


def test_stop_takes_parked_contexts_away_and_makes_no_more(make_pool: Callable[[int], Any]) -> None:
    pool = make_pool(3)
    parked, resumed, borrowed = (pool.borrow() for _ in range(3))
    pool.park(parked)
    pool.park(resumed)
    assert pool.resume(resumed)
    pool.stop()
    assert not pool.resume(parked)
    assert (parked.settled, resumed.settled) == (1, 0)
    assert pool.borrow() is parked  # for a run that waited
    with pytest.raises(EndedError):
        pool.borrow()
    with pytest.raises(EndedError):
        pool.park(borrowed)
    assert borrowed.settled == 1
    assert pool.borrow() is borrowed  # it was given back


def test_close_waits_for_contexts_that_are_in_use(make_pool: Callable[[int], Any]) -> None:
    pool = make_pool(2)
    first, second = pool.borrow(), pool.borrow()
    pool.give_back(first)
    pool.stop()
    closing = threading.Thread(target=pool.close, daemon=True)
    closing.start()
    while not first.closed:
        time.sleep(0.001)
    assert closing.is_alive()
    pool.give_back(second)
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert (first.closed, second.closed, pool.made) == (1, 1, [])


def test_where_there_is_no_room_for_one_more_a_run_waits_for_those_there_are(caplog: pytest.LogCaptureFixture) -> None:
    room = [Context()]

    def make() -> Context:
        if not room:
            raise DeviceMemoryError(2 << 20, 1 << 20, 8 << 20)
        return room.pop()

    pool: Any = ContextPool(make, 3, EndedError)  # type: ignore[arg-type]
    context = pool.borrow()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.borrow)
        while not pool._waiting:
            time.sleep(0.001)
        pool.give_back(context)
        assert waiting.result(WAIT_S) is context
    assert pool.borrow_free() is None  # it is not tried again and again
    assert [record.getMessage() for record in caplog.records] == [
        "no room for one more execution context: out of GPU memory: 2 MiB needed, 1 MiB of 8 MiB free; 1 will be shared"
    ]


def test_no_room_for_the_first_context_is_an_error() -> None:
    def make() -> Context:
        raise DeviceMemoryError(2 << 20, 1 << 20, 8 << 20)

    pool: Any = ContextPool(make, 3, EndedError)  # type: ignore[arg-type]
    for call in (pool.borrow, pool.borrow_free, pool.fill):
        with pytest.raises(DeviceMemoryError):
            call()
    pool.stop()
    pool.close()


def test_a_context_is_made_outside_the_lock_so_that_others_go_on_meanwhile(make_pool: Callable[[int], Any]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def make() -> Context:
        if begun.is_set():
            assert go_on.wait(WAIT_S)
        begun.set()
        return Context()

    pool: Any = ContextPool(make, 2, EndedError)  # type: ignore[arg-type]
    first = pool.borrow()
    with ThreadPoolExecutor(2) as threads:
        second = threads.submit(pool.borrow)
        while not pool._making:
            time.sleep(0.001)
        third = threads.submit(pool.borrow)  # may not make one, and waits
        pool.give_back(first)
        assert third.result(WAIT_S) is first
        pool.stop()
        closing = threading.Thread(target=pool.close, daemon=True)
        closing.start()
        go_on.set()
        pool.give_back(first)
        pool.give_back(second.result(WAIT_S))
        closing.join(WAIT_S)
    assert not closing.is_alive()
    assert first.closed == second.result().closed == 1


def test_once_a_context_has_lost_the_gpu_nobody_gets_any(make_pool: Callable[[int], Any]) -> None:
    pool = make_pool(2)
    first, second = pool.borrow(), pool.borrow()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.borrow)
        while not pool._waiting:
            time.sleep(0.001)
        first.lost = DeviceLostError("fake reason")
        pool.give_back(first)
        with pytest.raises(DeviceLostError, match="fake reason"):
            waiting.result(WAIT_S)
    pool.give_back(second)
    for call in (pool.borrow, pool.borrow_free):
        with pytest.raises(DeviceLostError, match="this process has lost its GPU, and must be started anew: fake reason"):
            call()


def test_all_contexts_are_closed_although_one_fails_and_none_in_use_is_waited_for_at_the_end_of_the_process(
    make_pool: Callable[[int], Any],
) -> None:
    pool = make_pool(3)
    pool.fill()
    used, failing, last = pool.borrow(), pool.borrow(), pool.borrow()
    failing.close = Failing(failing.close)
    for context in (failing, last):
        pool.give_back(context)
    pool.stop()
    with pytest.raises(BackendError, match="fake reason"):
        pool.close(wait=False)
    assert (failing.closed, last.closed, used.closed, pool.made) == (1, 1, 0, [used])


class Failing:
    """Does it and fails."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def __call__(self) -> None:
        self._work()
        raise BackendError("fake reason")
