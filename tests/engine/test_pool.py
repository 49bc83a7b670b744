"""The contexts of an engine, borrowed by runs, parked by streams and closed at the end; they stand for real ones here."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deploy.engine.cuda import DeviceLostError
from deploy.engine.pool import ContextPool

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
