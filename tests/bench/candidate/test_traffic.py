"""Sessions under load."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.bench.bench import bench
from deploy.bench.candidate.traffic import Load, put_on
from deploy.bench.options import BenchOptions
from deploy.errors import BackendError, UsageError


class Slow:
    """A session that takes `run_s`, and once `stall_s`; it counts how many runs there are at a time."""

    concurrency = 1

    def __init__(self, run_s: float, stall_s: float = 0.0, fails: bool = False) -> None:
        self.run_s, self.stall_s, self.fails = run_s, stall_s, fails
        self.runs = self.most = self._now = 0
        self._lock = threading.Lock()

    def run(self, feed: Mapping[str, Any]) -> None:
        with self._lock:
            self.runs += 1
            self._now += 1
            self.most = max(self.most, self._now)
            stall = self.stall_s if self.runs == 5 else 0.0
        if self.fails:
            raise BackendError("it broke")
        time.sleep(self.run_s + stall)
        with self._lock:
            self._now -= 1


def feed() -> dict[str, np.ndarray]:
    return {}


def test_callers_wait_for_their_answers() -> None:
    session = Slow(0.01)
    done = put_on(session, Load(concurrency=4), feed, 0.3)  # type: ignore[arg-type]
    assert session.most == 4
    assert len(done.latencies_s) == session.runs
    assert 60 <= session.runs <= 124
    assert 0.3 <= done.elapsed_s < 0.6
    assert min(done.latencies_s) >= 0.01


def test_a_stall_is_seen_by_all_that_were_due_meanwhile() -> None:
    session = Slow(0.001, stall_s=0.2)
    done = put_on(session, Load(rate=200), feed, 0.5)  # type: ignore[arg-type]
    assert session.most == 1
    assert len(done.latencies_s) == session.runs == 100
    assert done.unanswered == 0
    late = sum(latency > 0.02 for latency in done.latencies_s)
    assert late > 20  # those that a closed loop would not have sent


def test_requests_that_are_never_answered_are_counted_with_the_time_they_waited() -> None:
    done = put_on(Slow(0.02), Load(rate=1000), feed, 0.2)  # type: ignore[arg-type]
    assert len(done.latencies_s) == 200
    assert 160 < done.unanswered < 195
    assert done.elapsed_s < 0.6
    assert np.median(done.latencies_s) > 0.2


def test_an_error_of_a_run_is_raised() -> None:
    for load in (Load(concurrency=2), Load(rate=50)):
        with pytest.raises(BackendError, match="it broke"):
            put_on(Slow(0.0, fails=True), load, feed, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"concurrency": 1, "rate": 2.0}, {"concurrency": 0}, {"rate": 0.0}, {"rate": -1.0}])
def test_loads_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Load(**options)


def test_a_benchmark_puts_every_candidate_under_every_load(shared_lenet5: Artifact) -> None:
    loads = (Load(concurrency=2), Load(rate=100.0))
    options = BenchOptions(
        baseline="openvino", backends=("onnxruntime",), batches=(2,), seconds=0.2, loads=loads, load_seconds=0.3
    )
    found = bench([shared_lenet5], options)
    assert [(row.backend, row.concurrency, row.rate) for row in found.loads] == [
        ("openvino", 2, None),
        ("onnxruntime", 2, None),
        ("openvino", None, 100.0),
        ("onnxruntime", None, 100.0),
    ]
    for row in found.loads:
        assert len(row.samples_ms) == row.requests > 5
        assert row.images_per_s == pytest.approx(2 * row.requests_per_s)
        assert row.p50_ms <= row.p99_ms <= row.p999_ms
    assert found.to_json()["loads"][0]["requests"] == found.loads[0].requests
