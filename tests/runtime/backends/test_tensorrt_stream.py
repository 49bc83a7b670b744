"""Engines on the simulated GPU, from many threads: contexts, streams, and the end of a session."""

import contextlib
import gc
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import InputError, SessionClosedError
from tests.simulator.simulated import Simulated

Make = Callable[..., Artifact]


def batch(rows: int, seed: int = 0, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def contexts_of(simulated: Simulated) -> int:
    """How many contexts were made of the one engine."""
    (engine,) = simulated.trt.engines
    return engine.contexts


@pytest.fixture
def session(simulated: Simulated, make: Make) -> Any:
    with deploy.load(make()) as session:
        yield session


def test_threads_get_a_context_each_and_no_more_than_were_allowed(simulated: Simulated, make: Make) -> None:
    artifact = make()
    with deploy.load(artifact, contexts=3) as session, ThreadPoolExecutor(8) as pool:
        feeds = [batch(1 + index % 8, seed=index) for index in range(200)]
        for x, y in zip(feeds, pool.map(session, feeds), strict=True):
            np.testing.assert_array_equal(y, 2 * x)
        assert 1 <= contexts_of(simulated) <= 3


def test_one_context_serves_one_thread(session: Any, simulated: Simulated) -> None:
    for index in range(5):
        session(batch(1, seed=index))
    assert contexts_of(simulated) == 1


def test_run_async_returns_futures(session: Any) -> None:
    feeds = [batch(2, seed=index) for index in range(20)]
    futures = [session.run_async({"x": x}) for x in feeds]
    for x, future in zip(feeds, futures, strict=True):
        np.testing.assert_array_equal(future.result()["y"], 2 * x)
    with pytest.raises(InputError, match="outside every profile"):
        session.run_async({"x": batch(9)}).result()


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_a_stream_gives_all_outputs_in_order_with_several_feeds_under_way(
    simulated: Simulated, make: Make, contexts: int
) -> None:
    feeds = [batch(1 + index % 8, seed=index) for index in range(9)]
    taken = 0

    def source() -> Any:
        nonlocal taken
        for x in feeds:
            taken += 1
            yield {"x": x}

    with deploy.load(make(), contexts=contexts) as session:
        ahead = []
        for x, result in zip(feeds, session.stream(source()), strict=True):
            np.testing.assert_array_equal(result["y"], 2 * x)
            ahead.append(taken)
        assert ahead[0] == contexts + 1  # the next is at hand when there is room
        assert contexts_of(simulated) == contexts
        np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))  # all contexts came back


def test_a_stream_that_is_left_or_fails_gives_its_contexts_back(session: Any) -> None:
    for result in session.stream({"x": batch(2)} for _ in range(9)):
        assert result["y"].shape == (2, 4)
        np.testing.assert_array_equal(session(batch(1)), 2 * batch(1))  # in the middle of it
        break
    feeds = [batch(2), batch(2), batch(9)]
    with pytest.raises(InputError, match="outside every profile"):
        list(session.stream({"x": x} for x in feeds))
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(session, [batch(1)] * 4))) == 4


def test_a_closed_session_refuses_and_lets_go_of_everything(simulated: Simulated, make: Make) -> None:
    session = deploy.load(make())
    session(batch(2))
    session.close()
    session.close()
    gc.collect()
    assert simulated.held() == []
    for call in (lambda: session(batch(2)), lambda: session.run_async({"x": batch(2)}), lambda: next(session.stream([{}]))):
        with pytest.raises(SessionClosedError, match="the session on 'engine' is closed"):
            call()


def test_runs_under_way_finish_when_the_session_is_closed(simulated: Simulated, make: Make) -> None:
    session = deploy.load(make(), contexts=2)
    begun, results, errors, finished = threading.Barrier(5), [], [], []

    def work(seed: int) -> None:
        begun.wait()
        for index in range(5000):
            x = batch(3, seed=seed * 10000 + index)
            try:
                y = session(x)
            except SessionClosedError as error:
                errors.append(error)
                return
            results.append(bool((y == 2 * x).all()))
        finished.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    while len(results) < 5:
        pass
    session.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert all(results)
    assert errors
    assert len(errors) + len(finished) == 4


def test_runs_that_meet_a_close_end_with_a_result_or_a_closed_session(simulated: Simulated, make: Make) -> None:
    artifact = make()
    for _ in range(20):
        session = deploy.load(artifact, contexts=2)
        outcomes: list[object] = []
        started = threading.Barrier(5)

        def work(session: Any = session, outcomes: list[object] = outcomes, started: threading.Barrier = started) -> None:
            started.wait()
            try:
                for seed in range(30):
                    x = batch(2, seed)
                    np.testing.assert_array_equal(session(x), 2 * x)
                outcomes.append("done")
            except SessionClosedError:
                outcomes.append("closed")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        started.wait()
        session.close()
        for thread in threads:
            thread.join(20)
        assert len(outcomes) == 4, "a thread hangs or died of something else"
        assert set(outcomes) <= {"done", "closed"}


WAIT_S = 20.0


def close_here(session: Any) -> None:
    session.close()


def close_elsewhere(session: Any) -> None:
    thread = threading.Thread(target=session.close, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "close() hangs"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("close", [close_here, close_elsewhere])
@pytest.mark.parametrize("contexts", [1, 2, 3])
@pytest.mark.parametrize("read", [0, 1, 2])
def test_an_iterator_that_is_half_read_keeps_no_session_open(
    simulated: Simulated, make: Make, read: int, contexts: int, close: Callable[[Any], None]
) -> None:
    session = deploy.load(make(), contexts=contexts)
    outputs = session.stream({"x": batch(2, seed=index)} for index in range(6))
    for index in range(read):
        np.testing.assert_array_equal(next(outputs)["y"], 2 * batch(2, seed=index))
    close(session)
    assert all(stream.last is None or stream.last.reached() for stream in simulated.machine.everything())
    with pytest.raises(SessionClosedError, match="the session on 'engine' is closed"):
        next(outputs)
    assert list(outputs) == []
    gc.collect()
    assert simulated.held() == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("contexts", [1, 2])
def test_close_returns_while_a_stream_waits_for_its_next_feed_and_a_run_for_a_context(
    simulated: Simulated, make: Make, contexts: int
) -> None:
    session = deploy.load(make(), contexts=contexts)
    taken, go_on = threading.Event(), threading.Event()
    ended: list[BaseException] = []

    def source() -> Any:
        yield from ({"x": batch(2)} for _ in range(contexts))
        taken.set()
        assert go_on.wait(WAIT_S)
        yield {"x": batch(2)}

    def read() -> None:
        try:
            list(session.stream(source()))
        except SessionClosedError as error:
            ended.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert taken.wait(WAIT_S)
    waiting = session.run_async({"x": batch(1)})
    while not session._contexts._waiting:  # the stream has them all
        time.sleep(0.001)
    close_elsewhere(session)
    with contextlib.suppress(SessionClosedError):
        np.testing.assert_array_equal(waiting.result(WAIT_S)["y"], 2 * batch(1))
    assert reader.is_alive()
    go_on.set()
    reader.join(WAIT_S)
    assert len(ended) == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_an_iterator_that_is_read_while_the_session_is_closed_ends(simulated: Simulated, make: Make, contexts: int) -> None:
    artifact = make()
    for attempt in range(8):
        session = deploy.load(artifact, contexts=contexts)
        outcomes: list[object] = []
        begun = threading.Event()

        def read(session: Any = session, outcomes: list[object] = outcomes, begun: threading.Event = begun) -> None:
            try:
                for index, result in enumerate(session.stream({"x": batch(2, seed=seed)} for seed in itertools.count())):
                    np.testing.assert_array_equal(result["y"], 2 * batch(2, seed=index))
                    begun.set()
            except SessionClosedError:
                outcomes.append("closed")

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert begun.wait(WAIT_S)
        time.sleep(attempt / 8_000)
        close_elsewhere(session)
        reader.join(WAIT_S)
        assert outcomes == ["closed"]


def test_a_stream_checks_a_shape_in_full_once(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    check = type(session)._check
    monkeypatch.setattr(type(session), "_check", lambda self, feed: (checked.append(feed["x"].shape), check(self, feed))[1])
    assert len(list(session.stream({"x": batch(1 + index % 2)} for index in range(20)))) == 20
    assert sorted(checked) == [(1, 4), (2, 4)]
