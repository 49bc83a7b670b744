"""Engines on the simulated GPU: what goes in and out, profiles, and what is refused."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, Target
from deploy.errors import ArtifactError, BackendError, InputError
from tests.simulator.simulated import Simulated

Make = Callable[..., Artifact]


def batch(rows: int, seed: int = 0, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.fixture
def session(simulated: Simulated, make: Make) -> Any:
    with deploy.load(make()) as session:
        yield session


def test_auto_opens_an_engine_with_its_own_flavour(session: Any) -> None:
    assert (session.backend, session.device) == ("tensorrt", "cuda:0")


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_numpy_goes_in_and_out(session: Any, rows: int) -> None:
    x = batch(rows)
    np.testing.assert_array_equal(session(x), 2 * x)
    np.testing.assert_array_equal(session(np.asfortranarray(x)), 2 * x)


def test_an_input_larger_than_one_piece_is_staged_whole(simulated: Simulated, make: Make) -> None:
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


def test_arrays_of_other_libraries_go_in_and_out_without_a_copy(session: Any, simulated: Simulated) -> None:
    x = batch(4)
    given = simulated.array(x)
    before = simulated.held()
    result = session(given)
    (added,) = set(simulated.held()) - set(before)
    assert added.startswith("cudaMallocAsync")  # the output
    np.testing.assert_array_equal(result.numpy(), 2 * x)
    described = result.__cuda_array_interface__
    assert (described["shape"], described["typestr"]) == ((4, 4), "<f4")
    again = session(result)  # what came out goes in
    del given, result
    gc.collect()
    np.testing.assert_array_equal(again.numpy(), 4 * x)


def test_the_stream_that_an_array_is_made_on_is_waited_for(session: Any, simulated: Simulated) -> None:
    front = simulated.runtime
    stream = int(front.cudaStreamCreateWithFlags(front.cudaStreamNonBlocking)[1])
    given = simulated.array(batch(1), stream=stream)
    front.cudaMemsetAsync(given.pointer, 0, given.nbytes, stream)
    np.testing.assert_array_equal(session(given).numpy(), np.zeros((1, 4)))
    front.cudaStreamDestroy(stream)


def test_an_array_at_an_odd_address_is_copied_first(session: Any, simulated: Simulated) -> None:
    x = batch(2)
    np.testing.assert_array_equal(session(simulated.array(x, offset=16)).numpy(), 2 * x)


def test_strides_of_a_contiguous_array_do_not_matter_and_others_are_refused(session: Any, simulated: Simulated) -> None:
    x = batch(1)
    np.testing.assert_array_equal(session(simulated.array(x, strides=(999, 4))).numpy(), 2 * x)
    with pytest.raises(InputError, match="'x' is not contiguous in device memory; make it so first"):
        session(simulated.array(batch(2), strides=(4, 8)))


def test_mixed_feeds_and_other_objects_are_refused(session: Any) -> None:
    with pytest.raises(InputError, match="'x' is a list; expected a numpy array or a torch tensor, or an array on the GPU"):
        session([1.0])


def test_a_tensor_on_another_device_is_refused_with_both(session: Any) -> None:
    with pytest.raises(InputError, match="'x' is on meta; this session is on cuda:0"):
        session(torch.empty(2, 4, device="meta"))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            batch(9),
            r"x 9x4 is outside every profile of 'engine': expected x=1x4:4x4:8x4; build with `deploy build-trt --shapes` for more",
        ),
        (batch(2).astype(np.float64), "float64"),
        (batch(2)[:, :3], "x"),
    ],
)
def test_wrong_feeds_are_refused_and_the_session_goes_on(session: Any, x: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        session(x)
    np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))


def test_of_several_profiles_the_nearest_that_holds_the_shapes_is_used(simulated: Simulated, make: Make) -> None:
    with deploy.load(make(profiles=((1, 4), (4, 64)))) as session:
        for rows, profile in ((1, 0), (64, 1), (4, 0), (20, 1), (2, 0)):
            np.testing.assert_array_equal(session(batch(rows)), 2 * batch(rows))
            assert session._contexts.made[0]._context.active_optimization_profile == profile
        with pytest.raises(InputError, match="expected x=1x4:2x4:4x4 or x=4x4:34x4:64x4"):
            session(batch(65))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "10.16.0"}, "built with tensorrt 10.16.0, and 11.4.0 is installed"),
        ({"gpu": "NVIDIA L4"}, r"built on NVIDIA L4 \(compute capability 8.9\), and this is Simulated GPU \(8.9\)"),
        ({"driver": "610.1"}, "built with driver 610.1, and the older 580.95.05 is installed"),
    ],
)
def test_an_engine_for_another_machine_is_refused_with_both_sides(
    simulated: Simulated, make: Make, change: Any, message: str
) -> None:
    target = {"flavour": "tensorrt", "version": "11.4.0", "gpu": "Simulated GPU", "compute_capability": "8.9", "targets": ["8.9"]}
    with pytest.raises(BackendError, match=f"does not fit this machine: {message}; build it here, or open it with rebuild=True"):
        deploy.load(make(target=Target(**{**target, **change})))
    assert not simulated.trt.engines


@pytest.mark.parametrize("damage", [lambda plan: plan[:-1], lambda plan: plan[:5] + bytes([plan[5] ^ 1]) + plan[6:]])
def test_a_truncated_plan_and_a_flipped_byte_are_found_before_it_is_loaded(simulated: Simulated, make: Make, damage: Any) -> None:
    artifact = make()
    file = artifact.path / ENGINE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ArtifactError, match=r"engine.plan .*(bytes; the manifest says|is damaged)"):
        deploy.load(artifact)
    assert not simulated.trt.engines


def test_a_plan_that_the_library_refuses_is_an_error_with_its_reason(simulated: Simulated, make: Make) -> None:
    with pytest.raises(BackendError, match=r"tensorrt 11.4.0 cannot load .*engine: .*the plan is no simulated engine"):
        deploy.load(make(plan=b"no json"))


def test_only_engines_of_the_flavour_are_opened(simulated: Simulated, make: Make, shared_lenet5: Artifact) -> None:
    with pytest.raises(BackendError, match=r"is no engine; build one with `deploy build-trt .*lenet5 --flavour tensorrt`"):
        deploy.load(shared_lenet5, backend="tensorrt")
    with pytest.raises(BackendError, match="is a tensorrt engine: open it with the backend tensorrt"):
        deploy.load(make(), backend="tensorrt-rtx")
    with pytest.raises(BackendError, match="runs on cuda in this version, not on cpu"):
        deploy.load(make(), device="cpu")


def test_nothing_in_these_tests_passes_for_a_real_gpu(session: Any) -> None:
    assert session._gpu.gpu().name == "Simulated GPU"
