"""Engines on the simulated GPU: what fails, what is said of it, what is released, and what is made in advance."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import RUNTIME_CACHE
from deploy.engine import cuda
from deploy.engine.cuda import DeviceLostError, DeviceMemoryError
from deploy.errors import BackendError, SessionClosedError
from tests.simulator.contexts import ExecutionContext
from tests.simulator.simulated import Simulated

Make = Callable[..., Artifact]


@pytest.fixture(params=["cuda-python", "pycuda"])
def simulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    found = Simulated(monkeypatch, library=request.param)
    yield found
    if found.machine.sticky is None:  # of a GPU that is lost, nothing is known
        found.finish()


@pytest.fixture
def python_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    """For what is the same code with either library."""
    found = Simulated(monkeypatch, library="cuda-python")
    yield found
    found.finish()


def batch(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)


def test_a_failed_run_says_what_tensorrt_said_and_the_next_one_works(
    simulated: Simulated, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with deploy.load(make()) as session:
        for given in (batch(2), torch.tensor(batch(2), device="cuda"), simulated.array(batch(2))):
            with monkeypatch.context() as patch:
                patch.setattr(ExecutionContext, "_execute", lambda context, handle: context._refuse("fake reason"))
                with pytest.raises(BackendError, match="the engine failed to run: fake reason"):
                    session(given)
            np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))


def test_a_session_that_has_lost_its_gpu_says_so_every_time_and_closes(simulated: Simulated, make: Make) -> None:
    session = deploy.load(make())
    tensor, array = torch.tensor(batch(2), device="cuda"), simulated.array(batch(2))
    stream = session.stream({"x": batch(2)} for _ in range(5))
    next(stream)
    simulated.machine.sticky = "cudaErrorIllegalAddress"
    for given in (batch(2), tensor, array, batch(2)):
        with pytest.raises(DeviceLostError, match=r"lost its GPU, and must be started anew: .*cudaErrorIllegalAddress"):
            session(given)
    with pytest.raises(DeviceLostError, match="must be started anew"):
        next(stream)
    with pytest.raises(DeviceLostError, match="must be started anew"):
        session.run_async({"x": batch(2)}).result()
    session.close()
    with pytest.raises(SessionClosedError):
        session(batch(2))


def test_a_lost_gpu_does_not_keep_rtx_from_closing(
    monkeypatch: pytest.MonkeyPatch, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Simulated(monkeypatch, library="cuda-python").machine
    session = deploy.load(make(flavour="tensorrt-rtx"))
    machine.sticky = "cudaErrorIllegalAddress"
    with pytest.raises(DeviceLostError):
        session(batch(2))
    session.close()
    assert "what tensorrt-rtx compiled cannot be kept: CUDA failed" in caplog.text


def test_closing_releases_everything_although_the_gpu_fails_then(simulated: Simulated, make: Make) -> None:
    session = deploy.load(make())
    session(batch(2))
    simulated.machine.sticky = "cudaErrorIllegalAddress"
    with pytest.raises(DeviceLostError):
        session.close()
    assert not session._contexts.made  # type: ignore[attr-defined]
    assert not hasattr(session._engine, "_engine")  # type: ignore[attr-defined]
    session.close()


def test_an_error_that_does_not_last_is_no_loss(simulated: Simulated, make: Make) -> None:
    with deploy.load(make()) as session:
        session(batch(1))
        call = "stream_synchronize" if "pycuda" in cuda.LIBRARIES else "cudaStreamSynchronize"
        simulated.machine.fail(call, "cudaErrorInvalidValue")
        with pytest.raises(BackendError, match=r"CUDA failed: .*cudaErrorInvalidValue") as caught:
            session(batch(2))
        assert not isinstance(caught.value, DeviceLostError)
        np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))


def test_where_there_is_no_room_for_a_second_context_the_first_is_shared(
    python_only: Simulated, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with deploy.load(make(workspace=1 << 20), contexts=2) as session:
        session(batch(8))
        hog = Hog(python_only, leave=1 << 19)
        feeds = [batch(2, seed) for seed in range(12)]
        with caplog.at_level(logging.WARNING):
            for x, result in zip(feeds, session.stream({"x": x} for x in feeds), strict=True):
                np.testing.assert_array_equal(result["y"], 2 * x)
        assert len(session._contexts.made) == 1  # type: ignore[attr-defined]
        assert [record.getMessage() for record in caplog.records] == [
            "no room for one more execution context: out of GPU memory: 1 MiB needed, 0 MiB of 64 MiB free; 1 will be shared"
        ]
        del hog


class Hog:
    """Takes all memory of the first GPU but `leave` bytes."""

    def __init__(self, simulated: Simulated, leave: int) -> None:
        space, self._front = simulated.machine.space, simulated.runtime
        _, self._pointer = self._front.cudaMalloc(space.total - space.used.get(0, 0) - leave)

    def __del__(self) -> None:
        self._front.cudaFree(self._pointer)


def test_memory_that_torch_keeps_is_given_back_for_a_context(python_only: Simulated, make: Make) -> None:
    kept = torch.empty(1 << 22, dtype=torch.uint8, device="cuda")
    hog = Hog(python_only, leave=1 << 19)
    with pytest.raises(DeviceMemoryError, match="1 MiB needed"):
        deploy.load(make(workspace=1 << 20))
    del kept  # torch keeps its memory
    with deploy.load(make(workspace=1 << 20)) as session:
        np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))
    del hog


@pytest.mark.parametrize("times", [1, 2])
def test_no_memory_for_an_output_is_tried_once_more_with_what_is_kept_given_back(
    python_only: Simulated, make: Make, times: int
) -> None:
    with deploy.load(make()) as session:
        x = torch.tensor(batch(2), device="cuda")
        session(x)
        python_only.machine.failures["torch_allocate"] = ["cudaErrorMemoryAllocation"] * times
        if times == 2:
            with pytest.raises(DeviceMemoryError, match="out of GPU memory: 0 MiB needed"):
                session(x)
        np.testing.assert_array_equal(session(x).cpu().numpy(), 2 * batch(2))
        assert python_only.machine.calls["cudaMemPoolTrimTo"] == 1


def test_a_session_that_nobody_closes_is_released_without_a_garbage_collection(python_only: Simulated, make: Make) -> None:
    gc.disable()
    try:
        session = deploy.load(make())
        session(batch(2))
        session(torch.tensor(batch(2), device="cuda"))
        session(python_only.array(batch(2)))
        alive = weakref.ref(session)
        del session
        assert alive() is None
        assert python_only.machine.calls["cudaStreamDestroy"] == 1
    finally:
        gc.enable()
    assert not python_only.held()


def test_at_the_end_of_the_process_a_session_is_released_before_what_it_holds(simulated: Simulated, make: Make) -> None:
    """Finalizers run in the reverse order of their making, and a context's stream is made after its session."""
    before = set(weakref.finalize._registry)  # type: ignore[attr-defined]
    with deploy.load(make()) as session:
        kept = [session(batch(2)), session(simulated.array(batch(2)))]
        made = {each: info for each, info in weakref.finalize._registry.items() if each not in before}  # type: ignore[attr-defined]
        assert len(made) > 5
        assert [info.func.__name__ for info in made.values() if info.atexit] == ["_abandon"]
        del kept, made


@pytest.mark.parametrize("feed", ["numpy", "torch", "foreign"])
def test_warming_up_makes_all_contexts_and_runs_each(python_only: Simulated, make: Make, feed: str) -> None:
    with deploy.load(make(), contexts=3) as session:
        (engine,) = python_only.trt.engines
        assert engine.contexts == 1
        given = {"numpy": batch(4), "torch": torch.tensor(batch(4), device="cuda"), "foreign": python_only.array(batch(4))}[feed]
        session.warmup({"x": given}, runs=2)
        assert engine.contexts == 3
        assert python_only.machine.calls["execute_async_v3"] == 6
        assert {context._bound for context in session._contexts.made} == {(0, ((4, 4),))}  # type: ignore[attr-defined]


def test_warming_up_says_where_there_is_no_room_for_all_contexts(python_only: Simulated, make: Make) -> None:
    with deploy.load(make(workspace=1 << 20), contexts=2) as session:
        hog = Hog(python_only, leave=1 << 19)
        with pytest.raises(DeviceMemoryError, match="1 MiB needed"):
            session.warmup()
        del hog
        session.warmup()


def test_graphs_are_captured_one_after_the_other_whatever_other_threads_do(python_only: Simulated, make: Make) -> None:
    errors: list[BaseException] = []
    with deploy.load(make(profiles=((1, 64),)), "tensorrt:cuda_graph", contexts=4) as session:

        def work(seed: int) -> None:
            try:
                with torch.cuda.stream(torch.cuda.Stream()):
                    for index in range(12):
                        x = batch(1 + seed + 4 * (index // 3), seed)
                        given = torch.tensor(x, device="cuda") if index % 2 else x
                        found = session(given)
                        np.testing.assert_array_equal(found.cpu().numpy() if index % 2 else found, 2 * x)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert python_only.machine.calls["cudaGraphInstantiate"] > 1


def test_a_capture_that_fails_leaves_thread_and_stream_as_they_were(
    python_only: Simulated, make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = ExecutionContext._execute

    def fail_in_captures(context: ExecutionContext, handle: int) -> bool:
        if (capture := context._machine.stream(handle).capture) is None:
            return execute(context, handle)
        capture.invalidate("the test")
        return context._refuse("fake reason")

    monkeypatch.setattr(ExecutionContext, "_execute", fail_in_captures)
    with caplog.at_level(logging.WARNING), deploy.load(make(), "tensorrt:cuda_graph", contexts=1) as session:
        x = torch.tensor(batch(2), device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(4):
                np.testing.assert_array_equal(session(x).cpu().numpy(), 2 * batch(2))
            assert torch.cuda.current_stream() == stream
        assert not python_only.machine.captures
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph for 2x4: the engine failed to run: fake reason; it runs without"
    ]


def test_nvtx_ranges_are_made_with_the_variant_alone(python_only: Simulated, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    engine = make()
    with deploy.load(engine) as session:
        session(batch(2))
        assert not seen
    with deploy.load(engine, "tensorrt:nvtx") as session:
        session(batch(2))
        session(torch.tensor(batch(2), device="cuda"))
    assert seen[:3] == ["deploy: stage and enqueue", "deploy: wait", "deploy: enqueue"]


# TensorRT-RTX.


def test_rtx_captures_one_graph_for_inputs_at_many_addresses(python_only: Simulated, make: Make) -> None:
    with deploy.load(make(flavour="tensorrt-rtx"), "tensorrt-rtx:cuda_graph", contexts=1) as session:
        kept = [torch.tensor(batch(2, seed), device="cuda") for seed in range(4)]
        for seed, x in enumerate(kept):
            np.testing.assert_array_equal(session(x).cpu().numpy(), 2 * batch(2, seed))
        np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))
        (engine,) = python_only.rtx.engines
        assert engine.graphs == 1


@pytest.mark.parametrize(
    ("variant", "strategy"), [("", "LAZY"), (":eager_kernels", "EAGER"), (":general_kernels,cuda_graph", "NONE")]
)
def test_when_rtx_compiles_for_new_shapes_is_a_variant(python_only: Simulated, make: Make, variant: str, strategy: str) -> None:
    with deploy.load(make(flavour="tensorrt-rtx"), f"tensorrt-rtx{variant}") as session:
        config: Any = session._engine._config  # type: ignore[attr-defined]
        assert config.dynamic_shapes_kernel_specialization_strategy.name == strategy


def test_what_rtx_compiled_is_kept_at_warm_up_and_at_the_end_unless_more_is_there(python_only: Simulated, make: Make) -> None:
    engine = make(flavour="tensorrt-rtx")
    file = engine.path / RUNTIME_CACHE
    session = deploy.load(engine)
    assert not file.exists()
    session.warmup(runs=1)
    assert file.read_bytes() == b"kernels"
    file.write_bytes(b"kernels, and more of them")  # by another process
    session.close()
    assert file.read_bytes() == b"kernels, and more of them"
    file.write_bytes(b"a longer file of another driver")
    deploy.load(engine).close()
    assert file.read_bytes() == b"a longer file of another driver"  # the simulated cache keeps what it does not understand
    file.unlink()
    session = deploy.load(engine)
    del session  # nobody closed it
    assert file.read_bytes() == b"kernels"
