"""Sessions on the simulated GPU, used at random: threads, shapes, streams, foreign arrays, captures, failures, closes.

Whatever is done in whatever order, results are right, no rule is broken, and at the end nothing is left. `make soak` takes 10,000 steps
through each library.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError, SessionClosedError
from tests.simulator.artifacts import make_engine
from tests.simulator.simulated import Simulated

SOAK = bool(os.environ.get("DEPLOY_SOAK"))
STEPS = 50
LIMITS = settings(
    max_examples=200 if SOAK else 6,
    stateful_step_count=STEPS,
    deadline=None,
    database=None,
    derandomize=not SOAK,
    suppress_health_check=list(HealthCheck),
)
WAIT_S = 20.0
LARGEST = 16

rows = st.integers(1, LARGEST)
seeds = st.integers(0, 99)
streams = st.integers(0, 2)
"""The default stream, or one of two others."""

FAILURES = [
    ("execute_async_v3", "cudaErrorLaunchOutOfResources"),
    ("cudaMallocFromPoolAsync", "cudaErrorMemoryAllocation"),
    ("cudaHostAlloc", "cudaErrorMemoryAllocation"),
    ("torch_allocate", "cudaErrorMemoryAllocation"),
    ("create_execution_context", "cudaErrorMemoryAllocation"),
    ("cudaStreamBeginCapture", "cudaErrorUnknown"),
    ("cudaGraphInstantiate", "cudaErrorMemoryAllocation"),
]


@functools.cache
def engines() -> dict[bool, Artifact]:
    """An engine, and one with an output whose shape depends on data."""
    folder = Path(tempfile.mkdtemp(prefix="deploy-soak-"))
    profiles = ((1, 4), (2, LARGEST))
    return {
        depends: make_engine(folder / str(depends), profiles=profiles, outputs=("y", "positive") if depends else ("y",))
        for depends in (False, True)
    }


def batch(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


class Sessions(RuleBasedStateMachine):
    """At most two sessions at a time, and what came out of them."""

    sessions = Bundle("sessions")
    results = Bundle("results")

    library = "cuda-python"

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.simulated = Simulated(self.patch, library=self.library)
        self.machine = self.simulated.machine
        self.streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        self.open = 0

    @initialize(target=sessions, graphs=st.booleans())
    def first(self, graphs: bool) -> Any:
        return self.load(graphs, 2, False)

    def load(self, graphs: bool, contexts: int, depends: bool) -> Any:
        self.open += 1
        return deploy.load(engines()[depends], "tensorrt:cuda_graph" if graphs else "tensorrt", contexts=contexts)

    @precondition(lambda self: self.open < 2)
    @rule(target=sessions, graphs=st.booleans(), contexts=st.integers(1, 3), depends=st.booleans())
    def another(self, graphs: bool, contexts: int, depends: bool) -> Any:
        return self.load(graphs, contexts, depends)

    # Runs.

    def check(self, found: dict[str, Any], x: np.ndarray) -> None:
        np.testing.assert_array_equal(np.asarray(found["y"]), 2 * x)
        if "positive" in found:
            np.testing.assert_array_equal(np.asarray(found["positive"]), x[x > 0])

    @rule(session=sessions, count=rows, seed=seeds)
    def numpy(self, session: Any, count: int, seed: int) -> None:
        x = batch(count, seed)
        self.check(session.run({"x": x}), x)

    @rule(target=results, session=sessions, count=rows, seed=seeds, index=streams, late=st.booleans())
    def tensor(self, session: Any, count: int, seed: int, index: int, late: bool) -> Any:
        """A run for a caller who goes on at once: with the input, which is overwritten, and with the result, later."""
        x = batch(count, seed)
        with torch.cuda.stream(self.streams[index]):
            given = torch.from_numpy(x).cuda()
            if late:
                given.mul_(3)
                x = x * 3
            found = session.run({"x": given})
            given.zero_()
        return found, x, index

    @rule(result=consumes(results))
    def read(self, result: Any) -> None:
        found, x, index = result
        with torch.cuda.stream(self.streams[index]):
            self.check({name: y.cpu() for name, y in found.items()}, x)
        found.clear()  # the arguments of the last step are kept

    @rule(result=consumes(results), session=sessions)
    def feed_back(self, result: Any, session: Any) -> None:
        """What came out goes in, on another stream that waits."""
        found, x, index = result
        other = self.streams[(index + 1) % 3]
        other.wait_stream(self.streams[index])
        with torch.cuda.stream(other):
            for y in found.values():
                y.record_stream(other)
            self.check({name: y.cpu() for name, y in session.run({"x": found["y"]}).items()}, 2 * x)
        found.clear()

    @rule(session=sessions, count=rows, seed=seeds, index=streams)
    def out(self, session: Any, count: int, seed: int, index: int) -> None:
        x = batch(count, seed)
        with torch.cuda.stream(self.streams[index]):
            y = torch.zeros(count, 4, device="cuda")
            found = session.run({"x": torch.from_numpy(x).cuda()}, {"y": y})
            assert found["y"] is y
            np.testing.assert_array_equal(y.cpu(), 2 * x)

    @rule(session=sessions, count=rows, seed=seeds, stream=st.sampled_from([None, 1, 2]), offset=st.sampled_from([0, 16]))
    def foreign(self, session: Any, count: int, seed: int, stream: int | None, offset: int) -> None:
        x = batch(count, seed)
        given = self.simulated.array(x, stream=stream, offset=offset)
        if stream is not None:
            front = self.simulated.runtime
            front.cudaMemsetAsync(given.pointer + offset, 0, x.nbytes, stream)
            x = np.zeros_like(x)
        found = session.run({"x": given})
        self.check({name: y.numpy() for name, y in found.items()}, x)

    @rule(session=sessions, feeds=st.lists(st.tuples(rows, seeds), min_size=2, max_size=4))
    def threads(self, session: Any, feeds: list[tuple[int, int]]) -> None:
        def work(feed: tuple[int, int]) -> None:
            x = batch(*feed)
            with torch.cuda.stream(self.streams[feed[1] % 3]):
                self.check(session.run({"x": x}), x)
                found = session.run({"x": torch.from_numpy(x).cuda()})
                self.check({name: y.cpu() for name, y in found.items()}, x)

        with ThreadPoolExecutor(len(feeds)) as pool:
            list(pool.map(work, feeds))

    @rule(session=sessions, feeds=st.lists(st.tuples(rows, seeds), min_size=1, max_size=4))
    def futures(self, session: Any, feeds: list[tuple[int, int]]) -> None:
        arrays = [batch(*feed) for feed in feeds]
        for x, future in zip(arrays, [session.run_async({"x": x}) for x in arrays], strict=True):
            self.check(future.result(WAIT_S), x)

    # Streams of feeds.

    @rule(session=sessions, count=rows, seed=seeds, length=st.integers(1, 4))
    def stream(self, session: Any, count: int, seed: int, length: int) -> None:
        """Read to the end, or left half-read."""
        arrays = [batch(1 + (count + turn) % LARGEST, seed + turn) for turn in range(4)]
        outputs = session.stream({"x": x} for x in arrays)
        for x in arrays[:length]:
            self.check(next(outputs), x)
        outputs.close()

    # What goes wrong.

    @rule(
        session=sessions,
        count=rows,
        seed=seeds,
        failure=st.sampled_from(FAILURES),
        after=st.integers(0, 2),
        sort=st.integers(0, 2),
    )
    def failure(self, session: Any, count: int, seed: int, failure: tuple[str, str], after: int, sort: int) -> None:
        x = batch(count, seed)
        given = torch.from_numpy(x).cuda() if sort == 1 else self.simulated.array(x) if sort == 2 else x
        self.machine.fail(*failure, after=after)
        try:
            found = session.run({"x": given})
        except BackendError:
            found = None
        self.machine.failures.clear()
        if found is not None:
            self.check({name: y.cpu() if sort == 1 else y.numpy() if sort == 2 else y for name, y in found.items()}, x)
        self.check(session.run({"x": x}), x)

    @precondition(lambda self: self.library != "pycuda")  # which waits for the whole GPU
    @rule(session=sessions, count=rows, seed=seeds)
    def captured_elsewhere(self, session: Any, count: int, seed: int) -> None:
        """A capture of the program's own, in another thread, is not disturbed by a run here."""
        front, x = self.simulated.runtime, batch(count, seed)
        stream = self.streams[1].cuda_stream
        mode = front.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with ThreadPoolExecutor(1) as other:
            assert other.submit(front.cudaStreamBeginCapture, stream, mode).result(WAIT_S)[0] == front.cudaError_t.cudaSuccess
            try:
                self.check(session.run({"x": x}), x)
            finally:
                status, graph = other.submit(front.cudaStreamEndCapture, stream).result(WAIT_S)
        assert status == front.cudaError_t.cudaSuccess, status
        front.cudaGraphDestroy(graph)

    @rule()
    def free_what_is_kept(self) -> None:
        torch.cuda.empty_cache()

    # The end.

    @rule(session=consumes(sessions))
    def close(self, session: Any) -> None:
        self.open -= 1
        session.close()
        with pytest.raises(SessionClosedError):
            session.run({"x": batch(1, 0)})

    @rule(session=consumes(sessions), count=rows)
    def close_with_an_iterator_half_read(self, session: Any, count: int) -> None:
        self.open -= 1
        outputs: Iterator[Any] = session.stream({"x": batch(count, seed)} for seed in range(5))
        next(outputs)
        session.close()
        with pytest.raises(SessionClosedError):
            next(outputs)

    @rule(graphs=st.booleans(), count=rows)
    def forget(self, graphs: bool, count: int) -> None:
        """Nobody closes it."""
        forgotten = self.load(graphs, 1, False)
        self.open -= 1
        x = batch(count, 0)
        self.check(forgotten.run({"x": x}), x)

    @invariant()
    def no_rule_is_broken(self) -> None:
        self.simulated.settle()
        assert not self.machine.violations, self.machine.violations

    def teardown(self) -> None:
        try:
            for name in list(self.names_to_values):
                value = self.names_to_values.pop(name)
                if isinstance(value, tuple):
                    value[0].clear()  # the result of the last step is kept
                else:
                    value.close()
            self.bundles.clear()
            self.simulated.finish()
            assert self.simulated.held() == []
        finally:
            self.patch.undo()


def case(library: str) -> Callable[[], None]:
    machine = type(f"Sessions_{library}", (Sessions,), {"library": library})

    @pytest.mark.timeout(3600 if SOAK else 300)
    def test() -> None:
        run_state_machine_as_test(machine, settings=LIMITS)

    return test


test_sessions_through_cuda_python = case("cuda-python")
test_sessions_through_pycuda = case("pycuda")
