"""The runtime's own logic, on a fake GPU: contexts, staging, streams, graphs, lifetimes and errors."""

import dataclasses
import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, Target
from deploy.engine.cuda import DeviceMemoryError, Gpu
from deploy.engine.flavour import load_flavour
from deploy.engine.rebuild import engine_plan
from deploy.errors import ArtifactError, BackendError, InputError, SessionClosedError

Make = Callable[..., Artifact]


def batch(rows: int, seed: int = 0, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


class OnDevice:
    """An array in the memory of the fake, as CuPy would hand it over."""

    def __init__(self, gpu: Any, array: np.ndarray, stream: int | None = None, offset: int = 0, strides: Any = None) -> None:
        self.memory = gpu.allocate(array.nbytes + offset)
        self.memory.content[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        self.shape, self.dtype = array.shape, array.dtype
        self.__cuda_array_interface__ = {
            "data": (self.memory.pointer + offset, False),
            "shape": array.shape,
            "typestr": array.dtype.str,
            "strides": strides,
            "stream": stream,
            "version": 3,
        }


@pytest.fixture
def session(trt: Any, make: Make) -> Any:
    with deploy.load(make()) as session:
        yield session


def test_auto_opens_an_engine_with_its_own_flavour(session: Any) -> None:
    assert (session.backend, session.device) == ("tensorrt", "cuda:0")


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_numpy_goes_in_and_out(session: Any, rows: int) -> None:
    x = batch(rows)
    np.testing.assert_array_equal(session(x), 2 * x)
    np.testing.assert_array_equal(session(np.asfortranarray(x)), 2 * x)


def test_an_input_larger_than_one_piece_is_staged_whole(trt: Any, make: Make) -> None:
    x = batch(8, width=100_000)
    with deploy.load(make(width=100_000)) as session:
        np.testing.assert_array_equal(session(x), 2 * x)


def test_results_stay_as_they_are_when_the_session_goes_on(session: Any) -> None:
    x = batch(3)
    first = session(x)
    kept = first.copy()
    session(batch(3, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_out_is_written_to(session: Any) -> None:
    x, out = batch(3), np.zeros((3, 4), np.float32)
    assert session.run({"x": x}, {"y": out})["y"] is out
    np.testing.assert_array_equal(out, 2 * x)


def test_torch_tensors_on_the_cpu_go_in_and_out(session: Any) -> None:
    x = torch.from_numpy(batch(2))
    assert torch.equal(session(x), 2 * x)


def test_arrays_of_other_libraries_go_in_and_out_without_a_copy(session: Any, gpu: Any) -> None:
    x = batch(4)
    given = OnDevice(gpu, x)
    before = len(gpu.blocks)
    result = session(given)
    assert len(gpu.blocks) == before + 1  # the output
    np.testing.assert_array_equal(result.numpy(), 2 * x)
    described = result.__cuda_array_interface__
    assert (described["shape"], described["typestr"]) == ((4, 4), "<f4")
    again = session(result)  # what came out goes in
    del given, result
    gc.collect()
    np.testing.assert_array_equal(again.numpy(), 4 * x)


def test_the_stream_that_an_array_is_made_on_is_waited_for(session: Any, gpu: Any) -> None:
    session(OnDevice(gpu, batch(1), stream=77))
    assert gpu.waited == [77]


def test_an_array_at_an_odd_address_is_copied_first(session: Any, gpu: Any) -> None:
    x = batch(2)
    np.testing.assert_array_equal(session(OnDevice(gpu, x, offset=16)).numpy(), 2 * x)


def test_strides_of_a_contiguous_array_do_not_matter_and_others_are_refused(session: Any, gpu: Any) -> None:
    x = batch(1)
    np.testing.assert_array_equal(session(OnDevice(gpu, x, strides=(999, 4))).numpy(), 2 * x)
    with pytest.raises(InputError, match="'x' is not contiguous in device memory; make it so first"):
        session(OnDevice(gpu, batch(2), strides=(4, 8)))


def test_mixed_feeds_and_other_objects_are_refused(session: Any) -> None:
    with pytest.raises(InputError, match="'x' is a list; expected a numpy array or a torch tensor, or an array on the GPU"):
        session([1.0])


def test_a_tensor_on_another_device_is_refused_with_both(session: Any) -> None:
    with pytest.raises(InputError, match="'x' is on meta; this session is on cuda:0"):
        session(torch.empty(2, 4, device="meta"))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (batch(9), r"x 9x4 is outside every profile of 'engine': expected x=1x4:4x4:8x4; build with --shapes for more"),
        (batch(2).astype(np.float64), "float64"),
        (batch(2)[:, :3], "x"),
    ],
)
def test_wrong_feeds_are_refused_and_the_session_goes_on(session: Any, x: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        session(x)
    np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))


def test_of_several_profiles_the_nearest_that_holds_the_shapes_is_used(trt: Any, make: Make) -> None:
    with deploy.load(make(profiles=((1, 4), (4, 64)))) as session:
        for rows, profile in ((1, 0), (64, 1), (4, 0), (20, 1), (2, 0)):
            np.testing.assert_array_equal(session(batch(rows)), 2 * batch(rows))
            assert session._contexts.made[0]._context.profile == profile
        with pytest.raises(InputError, match="expected x=1x4:2x4:4x4 or x=4x4:34x4:64x4"):
            session(batch(65))


def test_threads_get_a_context_each_and_no_more_than_were_allowed(trt: Any, make: Make) -> None:
    artifact = make()
    with deploy.load(artifact, contexts=3) as session, ThreadPoolExecutor(8) as pool:
        feeds = [batch(1 + index % 8, seed=index) for index in range(200)]
        for x, y in zip(feeds, pool.map(session, feeds), strict=True):
            np.testing.assert_array_equal(y, 2 * x)
        assert 1 <= trt.engines[0].contexts <= 3


def test_one_context_serves_one_thread(session: Any, trt: Any) -> None:
    for index in range(5):
        session(batch(1, seed=index))
    assert trt.engines[0].contexts == 1


def test_run_async_returns_futures(session: Any) -> None:
    feeds = [batch(2, seed=index) for index in range(20)]
    futures = [session.run_async({"x": x}) for x in feeds]
    for x, future in zip(feeds, futures, strict=True):
        np.testing.assert_array_equal(future.result()["y"], 2 * x)
    with pytest.raises(InputError, match="outside every profile"):
        session.run_async({"x": batch(9)}).result()


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_a_stream_gives_all_outputs_in_order_with_several_feeds_under_way(trt: Any, make: Make, contexts: int) -> None:
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
        assert trt.engines[0].contexts == contexts
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


def test_a_graph_is_captured_on_the_second_run_of_a_shape_and_replayed(trt: Any, gpu: Any, make: Make) -> None:
    with deploy.load(make(), backend="tensorrt:cuda_graph", contexts=1) as session:
        for index in range(5):
            x = batch(3, seed=index)
            np.testing.assert_array_equal(session(x), 2 * x)
        assert (gpu.captures, gpu.launches, trt.engines[0].runs) == (1, 4, 2)  # one plain, one captured
        given = batch(3, seed=9)
        np.testing.assert_array_equal(session(OnDevice(gpu, given)).numpy(), 2 * given)
        assert (gpu.captures, gpu.launches) == (1, 5)  # the same graph
        x = batch(8)  # larger buffers: what was captured with the old ones is gone
        np.testing.assert_array_equal(session(x), 2 * x)
        for index in range(3):
            x = batch(3, seed=index)
            np.testing.assert_array_equal(session(x), 2 * x)
        assert gpu.captures == 2


def test_graphs_are_bounded(trt: Any, gpu: Any, make: Make) -> None:
    with deploy.load(make(profiles=((1, 64),)), backend="tensorrt:cuda_graph", contexts=1) as session:
        session(batch(64))
        for _ in range(2):
            for rows in range(1, 21):
                np.testing.assert_array_equal(session(batch(rows)), 2 * batch(rows))
        assert len(session._contexts.made[0]._graphs) == 8


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
        found = session.run({"x": OnDevice(gpu, x)})
        np.testing.assert_array_equal(found["positive"].numpy(), x[x > 0])
        np.testing.assert_array_equal(session.run({"x": -np.abs(x)})["positive"], np.zeros(0, np.float32))


def test_a_failed_run_is_an_error_and_the_next_one_works(session: Any, trt: Any, gpu: Any) -> None:
    for given in (batch(2), OnDevice(gpu, batch(2))):
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


def test_a_closed_session_refuses_and_lets_go_of_everything(trt: Any, gpu: Any, make: Make) -> None:
    session = deploy.load(make())
    session(batch(2))
    session.close()
    session.close()
    gc.collect()
    assert not gpu.blocks
    for call in (lambda: session(batch(2)), lambda: session.run_async({"x": batch(2)}), lambda: next(session.stream([{}]))):
        with pytest.raises(SessionClosedError, match="the session on 'engine' is closed"):
            call()


def test_runs_under_way_finish_when_the_session_is_closed(trt: Any, gpu: Any, make: Make) -> None:
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "10.16.0"}, "built with tensorrt 10.16.0, and 11.4.0 is installed"),
        ({"gpu": "NVIDIA L4"}, r"built on NVIDIA L4 \(compute capability 8.9\), and this is Fake GPU \(8.9\)"),
        ({"driver": "610.1"}, "built with driver 610.1, and the older 580.95.05 is installed"),
    ],
)
def test_an_engine_for_another_machine_is_refused_with_both_sides(trt: Any, make: Make, change: Any, message: str) -> None:
    target = {"flavour": "tensorrt", "version": "11.4.0", "gpu": "Fake GPU", "compute_capability": "8.9", "targets": ["8.9"]}
    with pytest.raises(BackendError, match=f"does not fit this machine: {message}; build it here, or open it with rebuild=True"):
        deploy.load(make(target=Target(**{**target, **change})))
    assert not trt.engines


@pytest.mark.parametrize("damage", [lambda plan: plan[:-1], lambda plan: plan[:5] + bytes([plan[5] ^ 1]) + plan[6:]])
def test_a_truncated_plan_and_a_flipped_byte_are_found_before_it_is_loaded(trt: Any, make: Make, damage: Any) -> None:
    artifact = make()
    file = artifact.path / ENGINE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ArtifactError, match=r"engine.plan .*(bytes; the manifest says|is damaged)"):
        deploy.load(artifact)
    assert not trt.engines


def test_a_plan_that_the_library_refuses_is_an_error_with_its_reason(trt: Any, make: Make) -> None:
    with pytest.raises(BackendError, match=r"tensorrt 11.4.0 cannot load .*engine: the plan is no plan of the fake"):
        deploy.load(make(plan=b"no json"))


def test_only_engines_of_the_flavour_are_opened(trt: Any, make: Make, shared_lenet5: Artifact) -> None:
    with pytest.raises(BackendError, match=r"is no engine; build one with `deploy build-trt .*lenet5 --flavour tensorrt`"):
        deploy.load(shared_lenet5, backend="tensorrt")
    with pytest.raises(BackendError, match="is a tensorrt engine: open it with the backend tensorrt"):
        deploy.load(make(), backend="tensorrt-rtx")
    with pytest.raises(BackendError, match="runs on cuda in this version, not on cpu"):
        deploy.load(make(), device="cpu")


def test_nothing_in_these_tests_passes_for_a_real_gpu(gpu: Any) -> None:
    assert gpu.library == "fake"
    assert "Fake" in gpu.gpu().name


def test_an_engine_that_does_not_fit_is_rebuilt_from_its_typed_file_and_kept(
    shared_lenet5: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder is the real one, of tensorrt-rtx; nothing can load what it builds without a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = deploy.build_trt(shared_lenet5, tmp_path / "engine", precision="fp16", flavour="tensorrt-rtx", cache=False)
    assert engine.manifest.target is not None
    old = msgspec.structs.replace(engine.manifest.target, version="1.2.0")
    stale = dataclasses.replace(engine, manifest=msgspec.structs.replace(engine.manifest, target=old))
    flavour, gpu = load_flavour("tensorrt-rtx"), Gpu(name="Fake GPU", compute_capability="8.9", driver=None)
    with pytest.raises(BackendError, match=r"built with tensorrt-rtx 1.2.0, and 1.7\S* is installed; build it here"):
        engine_plan(stale, flavour, gpu, rebuild=False)
    plan = engine_plan(stale, flavour, gpu, rebuild=True)
    assert len(plan) == pytest.approx(len((engine.path / ENGINE).read_bytes()), rel=0.05)
    (kept,) = (tmp_path / "cache" / "deploy" / "engines").iterdir()
    assert kept.read_bytes() == plan
    kept.write_bytes(b"kept")
    assert engine_plan(stale, flavour, gpu, rebuild=True) == b"kept"


def test_runs_that_meet_a_close_end_with_a_result_or_a_closed_session(trt: Any, make: Make) -> None:
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


@pytest.mark.parametrize("variant", ["tensorrt", "tensorrt:cuda_graph"])
def test_copies_and_the_run_are_timed_by_events_one_after_the_other(trt: Any, make: Make, variant: str) -> None:
    with deploy.load(make(), variant) as session:
        x = batch(4)
        found = session.device_times({"x": x}, runs=3)
        assert found is not None
        assert min(found.h2d_ms, found.gpu_ms, found.d2h_ms) > 0
        np.testing.assert_array_equal(session(x), 2 * x)  # it goes on as before
