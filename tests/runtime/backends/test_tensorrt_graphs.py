"""Engines on a fake GPU: CUDA graphs, outputs of unknown shape, failures, memory and times."""

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

Make = Callable[..., Artifact]


def batch(rows: int, seed: int = 0, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.fixture
def session(trt: Any, make: Make) -> Any:
    with deploy.load(make()) as session:
        yield session


def test_a_graph_is_captured_on_the_second_run_of_a_shape_and_replayed(trt: Any, gpu: Any, make: Make) -> None:
    with deploy.load(make(), backend="tensorrt:cuda_graph", contexts=1) as session:
        for index in range(5):
            x = batch(3, seed=index)
            np.testing.assert_array_equal(session(x), 2 * x)
        assert (gpu.captures, gpu.launches, trt.engines[0].runs) == (1, 4, 2)  # one plain, one captured
        given = batch(3, seed=9)
        np.testing.assert_array_equal(session(gpu.array(given)).numpy(), 2 * given)
        assert (gpu.captures, gpu.launches) == (1, 5)  # the same graph
        x = batch(8)  # larger buffers: what was captured with the old ones is gone
        np.testing.assert_array_equal(session(x), 2 * x)
        for index in range(3):
            x = batch(3, seed=index)
            np.testing.assert_array_equal(session(x), 2 * x)
        assert gpu.captures == 2


def test_a_graph_is_dropped_when_the_context_is_bound_to_other_shapes_or_another_profile(trt: Any, gpu: Any, make: Make) -> None:
    with deploy.load(make(profiles=((1, 4), (4, 64))), backend="tensorrt:cuda_graph", contexts=1) as session:
        session(batch(64))  # the buffers do not grow any more
        for captures, rows in enumerate((3, 2, 64, 3), start=1):
            for index in range(WORTH + 1):
                x = batch(rows, seed=index)
                np.testing.assert_array_equal(session(x), 2 * x)
            assert (gpu.captures, gpu.launches) == (captures, WORTH * captures)  # the first of each is a plain run


def test_where_no_graph_can_be_captured_it_is_said_once_and_runs_go_on(
    trt: Any, gpu: Any, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.capturable = False
    with caplog.at_level(logging.WARNING), deploy.load(make(), backend="tensorrt:cuda_graph", contexts=1) as session:
        for index in range(4):
            np.testing.assert_array_equal(session(batch(3, seed=index)), 2 * batch(3, seed=index))
    assert [record.message for record in caplog.records] == [
        "no CUDA graph for 3x4: the work cannot be captured in a CUDA graph: fake reason; it runs without"
    ]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt:cuda_graph"])
def test_outputs_whose_shape_depends_on_data(trt: Any, gpu: Any, make: Make, backend: str) -> None:
    with deploy.load(make(outputs=("y", "positive")), backend=backend) as session:
        for index, rows in enumerate((3, 8, 1, 8)):
            x = batch(rows, seed=index)
            found = session.run({"x": x})
            np.testing.assert_array_equal(found["positive"], x[x > 0])
            np.testing.assert_array_equal(found["y"], 2 * x)
        x = batch(5)
        found = session.run({"x": gpu.array(x)})
        np.testing.assert_array_equal(found["positive"].numpy(), x[x > 0])
        np.testing.assert_array_equal(session.run({"x": -np.abs(x)})["positive"], np.zeros(0, np.float32))


def test_a_failed_run_is_an_error_and_the_next_one_works(session: Any, trt: Any, gpu: Any) -> None:
    for given in (batch(2), gpu.array(batch(2))):
        trt.engines[0].failures.append(None)
        with pytest.raises(BackendError, match="the engine failed to run"):
            session(given)
        np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))


def test_out_of_memory_says_what_was_needed_and_the_session_goes_on(session: Any, gpu: Any) -> None:
    session(batch(1))
    gpu.total = gpu.used + 64
    with pytest.raises(DeviceMemoryError, match=r"out of GPU memory: 0 MiB needed, 0 MiB of \d+ MiB free") as caught:
        session(batch(8))
    assert caught.value.needed == 128 > caught.value.free
    np.testing.assert_array_equal(session(batch(1)), 2 * batch(1))
    gpu.total = 1 << 30
    np.testing.assert_array_equal(session(batch(8)), 2 * batch(8))


def test_no_memory_for_a_context_is_an_error_at_the_opening(trt: Any, gpu: Any, make: Make) -> None:
    gpu.total = 1 << 19
    with pytest.raises(DeviceMemoryError, match="1 MiB needed"):
        deploy.load(make())


@pytest.mark.parametrize("variant", ["tensorrt", "tensorrt:cuda_graph"])
def test_copies_and_the_run_are_timed_by_events_one_after_the_other(trt: Any, make: Make, variant: str) -> None:
    with deploy.load(make(), variant) as session:
        x = batch(4)
        found = session.device_times({"x": x}, runs=3)
        assert found is not None
        assert min(found.h2d_ms, found.gpu_ms, found.d2h_ms) > 0
        np.testing.assert_array_equal(session(x), 2 * x)  # it goes on as before
