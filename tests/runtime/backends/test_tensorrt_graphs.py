"""Engines on the simulated GPU: CUDA graphs, outputs of unknown shape, failures, memory and times."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.engine.cuda import DeviceMemoryError
from deploy.engine.replay import WORTH
from deploy.errors import BackendError
from tests.simulator.simulated import Simulated

Make = Callable[..., Artifact]


def batch(rows: int, seed: int = 0, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def counts(simulated: Simulated) -> tuple[int, int]:
    """How many graphs were captured, and how many launched."""
    calls = simulated.machine.calls
    return calls["cudaGraphInstantiate"], calls["cudaGraphLaunch"]


@pytest.fixture
def session(simulated: Simulated, make: Make) -> Any:
    with deploy.load(make()) as session:
        yield session


def test_a_graph_is_captured_on_the_second_run_of_a_shape_and_replayed(simulated: Simulated, make: Make) -> None:
    with deploy.load(make(), backend="tensorrt:cuda_graph", contexts=1) as session:
        for index in range(5):
            x = batch(3, seed=index)
            np.testing.assert_array_equal(session(x), 2 * x)
        assert (*counts(simulated), simulated.machine.calls["execute_async_v3"]) == (1, 4, 2)  # one plain, one captured
        given = batch(3, seed=9)
        np.testing.assert_array_equal(session(simulated.array(given)).numpy(), 2 * given)
        assert counts(simulated) == (1, 5)  # the same graph
        x = batch(8)  # larger buffers: what was captured with the old ones is gone
        np.testing.assert_array_equal(session(x), 2 * x)
        for index in range(3):
            x = batch(3, seed=index)
            np.testing.assert_array_equal(session(x), 2 * x)
        assert counts(simulated)[0] == 2


def test_a_graph_is_dropped_when_the_context_is_bound_to_other_shapes_or_another_profile(
    simulated: Simulated, make: Make
) -> None:
    with deploy.load(make(profiles=((1, 4), (4, 64))), backend="tensorrt:cuda_graph", contexts=1) as session:
        session(batch(64))  # the buffers do not grow any more
        for captures, rows in enumerate((3, 2, 64, 3), start=1):
            for index in range(WORTH + 1):
                x = batch(rows, seed=index)
                np.testing.assert_array_equal(session(x), 2 * x)
            assert counts(simulated) == (captures, WORTH * captures)  # the first of each is a plain run


def test_shapes_that_take_turns_keep_their_graphs_where_each_has_a_context(simulated: Simulated, make: Make) -> None:
    with deploy.load(make(), backend="tensorrt:cuda_graph", contexts=2) as session:
        session.warmup({"x": batch(8)}, runs=1)  # both contexts are there
        assert counts(simulated) == (0, 0)
        for index in range(6):
            for rows in (8, 3):
                x = batch(rows, seed=index)
                np.testing.assert_array_equal(session(x), 2 * x)
                np.testing.assert_array_equal(session(simulated.array(x)).numpy(), 2 * x)
        assert counts(simulated)[0] == 2
        assert simulated.machine.calls["execute_async_v3"] == 2 + 1 + 2  # two to warm up, one plain for the 3, two captured
        for rows in (5, 8, 3, 5):  # three shapes on two contexts: the one unused for longest gives way
            np.testing.assert_array_equal(session(batch(rows)), 2 * batch(rows))


def test_where_no_graph_can_be_captured_it_is_said_once_and_runs_go_on(
    simulated: Simulated, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    simulated.machine.fail("cudaGraphInstantiate", "cudaErrorNotSupported")
    with caplog.at_level(logging.WARNING), deploy.load(make(), backend="tensorrt:cuda_graph", contexts=1) as session:
        for index in range(4):
            np.testing.assert_array_equal(session(batch(3, seed=index)), 2 * batch(3, seed=index))
    assert [record.message for record in caplog.records] == [
        "no CUDA graph for 3x4: CUDA failed: operation not supported (cudaErrorNotSupported); it runs without"
    ]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt:cuda_graph"])
def test_outputs_whose_shape_depends_on_data(simulated: Simulated, make: Make, backend: str) -> None:
    with deploy.load(make(outputs=("y", "positive")), backend=backend) as session:
        for index, rows in enumerate((3, 8, 1, 8)):
            x = batch(rows, seed=index)
            found = session.run({"x": x})
            np.testing.assert_array_equal(found["positive"], x[x > 0])
            np.testing.assert_array_equal(found["y"], 2 * x)
        x = batch(5)
        found = session.run({"x": simulated.array(x)})
        np.testing.assert_array_equal(found["positive"].numpy(), x[x > 0])
        np.testing.assert_array_equal(session.run({"x": -np.abs(x)})["positive"], np.zeros(0, np.float32))


def test_a_failed_run_is_an_error_and_the_next_one_works(session: Any, simulated: Simulated) -> None:
    for given in (batch(2), simulated.array(batch(2))):
        simulated.machine.fail("execute_async_v3", "cudaErrorLaunchOutOfResources")
        with pytest.raises(BackendError, match="the engine failed to run"):
            session(given)
        np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))


def test_out_of_memory_says_what_was_needed_and_the_session_goes_on(simulated: Simulated, make: Make) -> None:
    small, large, space = batch(1, width=64), batch(8, width=64), simulated.machine.space
    with deploy.load(make(width=64)) as session:
        session(small)
        space.total = space.used[0] + 512
        with pytest.raises(DeviceMemoryError, match=r"out of GPU memory: 0 MiB needed, 0 MiB of \d+ MiB free") as caught:
            session(large)
        assert caught.value.needed == 2048 > caught.value.free
        np.testing.assert_array_equal(session(small), 2 * small)
        space.total = 1 << 26
        np.testing.assert_array_equal(session(large), 2 * large)


def test_no_memory_for_a_context_is_an_error_at_the_opening(simulated: Simulated, make: Make) -> None:
    simulated.machine.space.total = 1 << 19
    with pytest.raises(DeviceMemoryError, match="1 MiB needed"):
        deploy.load(make(workspace=1 << 20))


@pytest.mark.parametrize("variant", ["tensorrt", "tensorrt:cuda_graph"])
def test_copies_and_the_run_are_timed_by_events_one_after_the_other(simulated: Simulated, make: Make, variant: str) -> None:
    with deploy.load(make(), variant) as session:
        x = batch(4)
        found = session.device_times({"x": x}, runs=3)
        assert found is not None
        assert min(found.h2d_ms, found.gpu_ms, found.d2h_ms) > 0
        np.testing.assert_array_equal(session(x), 2 * x)  # it goes on as before
