"""Load on one session: callers that wait for their answers, or requests that come at a rate, answered or not."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from deploy.errors import UsageError
from deploy.runtime.session import Session

_SPIN_S = 2e-4
"""A thread stops sleeping this long before its request is due: a sleep may last that much longer than asked."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """A load. concurrency: callers in a closed loop. rate: requests a second in an open loop, with Poisson arrivals."""

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise UsageError("a load is either a `concurrency` or a `rate`")
        if self.concurrency is not None and self.concurrency < 1:
            raise UsageError(f"`concurrency` must be 1 or more, not {self.concurrency}")
        if self.rate is not None and not self.rate > 0:
            raise UsageError(f"`rate` must be more than 0 requests a second, not {self.rate:g}")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Seconds of each request, and of the whole. In an open loop, a request counts from when it was due.

    unanswered: requests of an open loop that had not begun when twice the time was over; they are among the latencies with
    the time that they had waited by then, which is less than they would have taken.
    """

    latencies_s: list[float]
    elapsed_s: float
    unanswered: int = 0


def put_on(session: Session, load: Load, next_feed: Callable[[], dict[str, np.ndarray]], seconds: float) -> Answered:
    """Put `session` under load for `seconds`; an error of a run is raised.

    Closed loop: `concurrency` threads call `run` one run after the other. Open loop: requests are due at times drawn from a
    Poisson process and answered in order by as many threads as the session can use (`Session.concurrency`); a
    request that waits for them has its latency counted from when it was due, so that a stall is not hidden (coordinated
    omission: Tene, How NOT to Measure Latency, 2013).
    """
    if load.rate is None:
        assert load.concurrency is not None
        return _run(session, [_closed(seconds)] * load.concurrency, next_feed)
    gaps = np.random.default_rng(0).exponential(1 / load.rate, size=max(1, int(load.rate * seconds)))
    due: deque[float] = deque(np.cumsum(gaps).tolist())
    over = time.perf_counter() + 2 * seconds

    def take() -> Iterator[float]:
        while time.perf_counter() < over:
            try:
                yield due.popleft()
            except IndexError:
                return

    done = _run(session, [take] * session.concurrency, next_feed)
    waited = [done.elapsed_s - at for at in due]
    return replace(done, latencies_s=done.latencies_s + waited, unanswered=len(waited))


def _closed(seconds: float) -> Callable[[], Iterator[None]]:
    def take() -> Iterator[None]:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            yield None

    return take


def _run(
    session: Session, sources: list[Callable[[], Iterator[float | None]]], next_feed: Callable[[], dict[str, np.ndarray]]
) -> Answered:
    """Run a thread for each source, which yields when its requests are due: seconds after the start, or None for at once."""
    latencies_s: list[list[float]] = [[] for _ in sources]
    errors: list[Exception] = []
    gate = threading.Barrier(len(sources) + 1)
    feeds = threading.Lock()
    start = 0.0

    def work(take: Callable[[], Iterator[float | None]], samples: list[float]) -> None:
        gate.wait()
        try:
            for due in take():
                with feeds:
                    feed = next_feed()
                began = time.perf_counter() if due is None else _sleep_until(start + due)
                session.run(feed)
                samples.append(time.perf_counter() - began)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(sources, latencies_s, strict=True)]
    for thread in threads:
        thread.start()
    start = time.perf_counter()
    gate.wait()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    if errors:
        raise errors[0]
    return Answered(latencies_s=list(itertools.chain.from_iterable(latencies_s)), elapsed_s=elapsed)


def _sleep_until(at: float) -> float:
    """Wait until `at` on the performance counter, and return `at`; returns at once if it is past."""
    left = at - time.perf_counter()
    if left > _SPIN_S:
        time.sleep(left - _SPIN_S)
    while time.perf_counter() < at:
        pass
    return at
