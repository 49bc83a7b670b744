"""Sessions on the simulated GPU: what callers may do with streams, threads, graphs and memory, and what a session leaves behind."""

import gc
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.engine import cuda
from deploy.errors import BackendError, InputError
from tests.simulator.simulated import Simulated

Make = Callable[..., Artifact]
WAIT_S = 20.0


def batch(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)


def tensor(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(batch(rows, seed)).cuda()


@pytest.fixture(params=list(cuda.LIBRARIES))
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each library that CUDA can be reached through."""
    monkeypatch.setattr(cuda, "LIBRARIES", {request.param: cuda.LIBRARIES[request.param]})
    return str(request.param)


def rendered(record: logging.LogRecord) -> bool:
    """pytest keeps records, and the errors in them hold what failed."""
    record.msg, record.args = record.getMessage(), ()
    return True


@pytest.fixture(autouse=True)
def nothing_is_left(simulated: Simulated) -> Iterator[None]:
    """Whatever a test did: the program gives everything back, unless the GPU is broken."""
    logging.getLogger("deploy.runtime").addFilter(rendered)
    yield
    logging.getLogger("deploy.runtime").removeFilter(rendered)
    if simulated.machine.sticky is None:
        assert simulated.held() == []


def session_streams(session: Any) -> list[int]:
    return [context.stream.handle for context in session._contexts.made]


# Streams.


def test_the_callers_stream_is_waited_for_and_waits(simulated: Simulated, make: Make, library: str) -> None:
    with deploy.load(make()) as session:
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                x = tensor(3)
                x.add_(1)  # not over when the run is asked for
                y = session(x) * 2
                x.zero_()
                y = y.cpu()
            np.testing.assert_allclose(y.numpy(), 4 * (batch(3) + 1), rtol=1e-6)
            del x, y


def test_a_run_for_a_caller_on_the_default_stream_returns_before_it_is_done(simulated: Simulated, make: Make) -> None:
    with deploy.load(make()) as session:
        x = tensor(3)
        session(x)
        torch.cuda.synchronize()
        x.add_(1)
        before = simulated.machine.waits
        y = session(x)
        assert simulated.machine.waits == before
        del x, y


@pytest.mark.parametrize("handle", [None, 1, 2, "foreign"])
def test_the_stream_that_an_array_is_made_on_is_waited_for(simulated: Simulated, make: Make, library: str, handle: Any) -> None:
    front = simulated.runtime
    with deploy.load(make()) as session:
        made = front.cudaStreamCreateWithFlags(front.cudaStreamNonBlocking)[1] if handle == "foreign" else handle
        given = simulated.array(batch(3), stream=None if made is None else int(made))
        if made is not None:
            front.cudaMemsetAsync(given.pointer, 0, given.nbytes, int(made))
        result = session(given)
        np.testing.assert_array_equal(result.numpy(), np.zeros((3, 4)) if made is not None else 2 * batch(3))
        del given, result
        if handle == "foreign":
            front.cudaStreamDestroy(made)


def test_numpy_runs_are_ordered_whatever_the_default_stream_has_to_do(simulated: Simulated, make: Make, library: str) -> None:
    x = torch.ones(4, 4, device="cuda")
    with deploy.load(make()) as session:
        for rows in (1, 4, 8):
            x.add_(1)  # pending on the default stream while buffers are allocated
            np.testing.assert_array_equal(session(batch(rows)), 2 * batch(rows))
    del x


def test_the_streams_of_a_session_are_its_own_and_do_not_wait_for_the_default_stream(
    simulated: Simulated, make: Make, library: str
) -> None:
    with deploy.load(make()) as session:
        session(batch(2))
        handles = {torch.cuda.Stream().cuda_stream for _ in range(32)}
        assert not handles & set(session_streams(session))
        assert not any(simulated.machine.streams[handle].blocking for handle in session_streams(session))


def test_calls_on_arrays_make_nothing_anew(simulated: Simulated, make: Make) -> None:
    """What a call costs: no stream, no event, and no cudaMalloc or cudaFree, which wait for the GPU."""
    with deploy.load(make()) as session:
        given = simulated.array(batch(3))
        for _ in range(3):
            session(given)
        before = dict(simulated.machine.calls)
        for _ in range(3):
            session(given)
        made = {name for name, count in simulated.machine.calls.items() if count > before.get(name, 0)}
        dear = {
            "cudaMalloc",
            "cudaFree",
            "cudaStreamCreateWithFlags",
            "cudaHostAlloc",
            "cudaEventCreateWithFlags",
            "stream_create",
        }
        assert not made & dear
        del given


def test_a_caller_keeps_its_current_gpu(simulated: Simulated, make: Make, library: str) -> None:
    simulated.machine.here.device = 1
    with deploy.load(make(), device="cuda:0") as session:
        np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))
        assert simulated.machine.here.device == 1
        np.testing.assert_array_equal(session(session.to_device({"x": batch(3)})["x"]).numpy(), 2 * batch(3))
        assert simulated.machine.here.device == 1
    simulated.machine.here.device = 0


def test_an_array_on_another_gpu_is_refused(simulated: Simulated, make: Make) -> None:
    with deploy.load(make(), device="cuda:0") as session:
        with pytest.raises(InputError, match="cuda:1"):
            session(simulated.array(batch(2), index=1))
        with pytest.raises(InputError, match="is on cuda:1; this session is on cuda:0"):
            session(torch.ones(2, 4, device="cuda:1"))


# Graphs.


@pytest.fixture
def graphs(simulated: Simulated, make: Make) -> Iterator[Any]:
    with deploy.load(make(profiles=((1, 4), (4, 64))), backend="tensorrt:cuda_graph", contexts=1) as session:
        yield session


def test_graphs_hold_for_the_shape_and_the_profile_they_were_captured_with(graphs: Any) -> None:
    for rows in (2, 2, 2, 3, 3, 3, 2, 2, 40, 40, 40, 2, 2, 2, 40):
        np.testing.assert_array_equal(graphs(batch(rows, seed=rows)), 2 * batch(rows, seed=rows))
    for rows in (2, 2, 2, 3, 2, 40, 2):
        y = graphs(tensor(rows, seed=rows))
        np.testing.assert_array_equal(y.cpu().numpy(), 2 * batch(rows, seed=rows))
        del y


def test_graphs_are_replayed(graphs: Any, simulated: Simulated) -> None:
    for _ in range(6):
        graphs(batch(2))
    calls = simulated.machine.calls
    assert calls["cudaGraphLaunch"] + calls["graph_launch"] >= 4
    assert calls["execute_async_v3"] == 2  # a plain run, and the capture


def test_a_failed_capture_leaves_the_caller_as_it_was(
    simulated: Simulated, graphs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Another thread of the program waits for the GPU meanwhile, which ends a capture."""

    def disturb() -> None:
        if simulated.machine.captures:
            thread = threading.Thread(target=simulated.runtime.cudaDeviceSynchronize)
            thread.start()
            thread.join(WAIT_S)

    before = torch.cuda.current_stream()
    x = tensor(2)
    graphs(x)
    simulated.machine.hooks["execute_async_v3"] = disturb
    with caplog.at_level(logging.WARNING):
        y = graphs(x)
    simulated.machine.hooks.clear()
    assert "no CUDA graph for 2x4" in caplog.text
    assert torch.cuda.current_stream() == before
    assert not simulated.machine.captures
    np.testing.assert_array_equal(y.cpu().numpy(), 2 * batch(2))
    del x, y


def test_what_is_dropped_amid_a_capture_does_not_end_it(simulated: Simulated) -> None:
    device = cuda.open_device(0)
    stream, other = device.stream(), device.stream()
    held = [device.stream(), device.event(), device.pinned(100), device.allocate(100, other)]
    held.append(device.capture(lambda: None, stream))
    device.capture(held.clear, stream).launch(stream)
    stream.synchronize()


def test_threads_that_capture_at_once_do_not_disturb_one_another(
    simulated: Simulated, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    begun, tried = threading.Event(), threading.Event()

    def pause() -> None:  # in a capture, until another thread has tried to begin one
        if simulated.machine.captures and not begun.is_set():
            begun.set()
            tried.wait(0.5)

    def work(session: Any, seed: int) -> None:
        for turn in range(4):
            np.testing.assert_array_equal(session(batch(2, seed + turn)), 2 * batch(2, seed + turn))
            if begun.is_set() and seed:
                tried.set()

    caplog.set_level(logging.WARNING)
    with deploy.load(make(), backend="tensorrt:cuda_graph", contexts=2) as session, ThreadPoolExecutor(2) as pool:
        simulated.machine.hooks["execute_async_v3"] = pause
        list(pool.map(work, (session, session), (0, 10)))
        simulated.machine.hooks.clear()
    assert [record.message for record in caplog.records if "no CUDA graph" in record.message] == []


def test_the_graphs_of_rtx_see_one_set_of_addresses(simulated: Simulated, make: Make) -> None:
    with deploy.load(make(flavour="tensorrt-rtx"), backend="tensorrt-rtx:cuda_graph", contexts=1) as session:
        kept = []
        for seed in range(5):
            x = tensor(2, seed)
            kept += [x, session(x)]
        (engine,) = simulated.rtx.engines
        assert 1 <= engine.graphs <= 2
        kept.clear()
        del x, engine


def test_the_runtime_cache_of_rtx_is_used_on_its_gpu(simulated: Simulated, make: Make) -> None:
    artifact = make(flavour="tensorrt-rtx")
    for _ in range(2):
        simulated.machine.here.device = 1
        with deploy.load(artifact, device="cuda:0") as session:
            np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))
    simulated.machine.here.device = 0
    assert simulated.rtx.totals["cache read"] == 1


# Failures.


def test_the_reason_of_a_failed_run_is_told_and_the_next_one_works(simulated: Simulated, make: Make, library: str) -> None:
    with deploy.load(make()) as session:
        for given in (batch(2), simulated.array(batch(2))):
            simulated.machine.fail("execute_async_v3", "cudaErrorLaunchOutOfResources")
            with pytest.raises(BackendError, match="cudaErrorLaunchOutOfResources"):
                session(given)
            del given
            np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))


def test_a_lost_gpu_is_told_by_every_call_and_the_session_closes(simulated: Simulated, make: Make, library: str) -> None:
    session = deploy.load(make())
    session(batch(2))
    x = tensor(2)
    simulated.machine.sticky = "cudaErrorIllegalAddress"
    for given in (batch(2), batch(2), x):
        with pytest.raises(BackendError):
            session(given)
    session.close()
    session.close()


def test_a_second_context_for_which_there_is_no_room_is_waited_for(simulated: Simulated, make: Make) -> None:
    big = 1 << 25
    artifact = make(workspace=big)
    simulated.machine.space.total = big + (1 << 22)
    inside, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        if not inside.is_set():
            inside.set()
            go_on.wait(WAIT_S)

    with deploy.load(artifact, contexts=2) as session, ThreadPoolExecutor(2) as pool:
        simulated.machine.hooks["execute_async_v3"] = pause
        first = pool.submit(session, batch(2))
        assert inside.wait(WAIT_S)
        second = pool.submit(session, batch(3))
        threading.Timer(0.2, go_on.set).start()
        np.testing.assert_array_equal(first.result(WAIT_S), 2 * batch(2))
        np.testing.assert_array_equal(second.result(WAIT_S), 2 * batch(3))


# The end.


def test_a_session_that_nobody_closes_lets_go_at_once(simulated: Simulated, make: Make) -> None:
    session = deploy.load(make(outputs=("y", "positive")))
    session.run({"x": batch(2)})
    gone = weakref.ref(session)
    gc.disable()
    try:
        del session
        assert gone() is None
        simulated.settle()
        assert [owner.label for owner in simulated.machine.space.live() if "workspace" in owner.label] == []
    finally:
        gc.enable()


def test_a_session_is_closed_in_another_thread_than_it_was_opened_in(simulated: Simulated, make: Make, library: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        session = pool.submit(lambda: deploy.load(make())).result(WAIT_S)
        np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))
        session.close()
    with ThreadPoolExecutor(1) as pool:
        given = deploy.load(make())
        pool.submit(given, batch(2)).result(WAIT_S)
        pool.submit(given.close).result(WAIT_S)
        del given


def test_an_empty_array_can_be_put_on_the_gpu(simulated: Simulated, make: Make, library: str) -> None:
    with deploy.load(make()) as session:
        empty = session.to_device({"x": np.zeros((0, 4), np.float32)})["x"]
        assert empty.numpy().shape == (0, 4)
        del empty


# Forks.


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_is_told_that_cuda_does_not_survive_a_fork(simulated: Simulated, make: Make) -> None:
    session = deploy.load(make(), contexts=2)
    batcher = deploy.Batcher(session)
    feed = {"x": batch(2)}
    expected = session.run(feed)["y"]
    stream = session.stream([feed] * 4)
    next(stream)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(int(WAIT_S))
        uses: list[Callable[[], Any]] = [
            lambda: session.run(feed), lambda: next(session.stream([feed])), lambda: next(stream), session.warmup,
            lambda: session.run_async(feed).result(), lambda: batcher.run(feed), lambda: session.layer_times(feed),
        ]  # fmt: skip
        try:
            for use in uses:
                with pytest.raises(BackendError, match=r"CUDA does not survive a fork: call deploy\.load\(\) in the child"):
                    use()
            before = simulated.held()
            batcher.close()
            session.close()
            assert simulated.held() == before  # what the parent has on the GPU is not given back
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        assert told.read() == ""
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for outputs in stream:
        np.testing.assert_allclose(outputs["y"], expected)
    batcher.close()
    session.close()
