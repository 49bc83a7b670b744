"""Engines on the simulated GPU: arrays on the GPU in and out, whose streams order the work, through both libraries."""

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX
from deploy.artifact.tensors import TensorSpec
from deploy.artifact.writer import ArtifactWriter
from deploy.engine import cuda
from deploy.engine.cuda import Memory, Stream
from deploy.engine.cuda.arrays import DeviceArray, view
from deploy.errors import BackendError, InputError
from tests.simulator.plans import make_plan
from tests.simulator.simulated import Simulated

Make = Callable[..., Artifact]


@pytest.fixture(params=["cuda-python", "pycuda"])
def simulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    found = Simulated(monkeypatch, library=request.param)
    yield found
    found.finish()


Ranges = dict[str, tuple[tuple[int, ...], ...]]


def engine_of(folder: Path, like: Artifact, graph: str, inputs: list[TensorSpec], output: TensorSpec, ranges: Ranges) -> Artifact:
    """An engine with the one output `y`; an int64 input is read in host memory."""
    typed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {graph}').SerializeToString()
    with ArtifactWriter(folder / "other") as writer:
        host = [spec.name for spec in inputs if spec.dtype == "int64"]
        (writer.path / ENGINE).write_bytes(make_plan(typed, [ranges], host=host))  # type: ignore[list-item]
        (writer.path / ONNX).write_bytes(typed)
        return writer.commit(msgspec.structs.replace(like.manifest, files={}, inputs=inputs, outputs=[output]))


def copying(folder: Path, like: Artifact, dtype: str, said: str) -> Artifact:
    """An engine `y = x` in a dtype, of which the manifest says another."""
    kind = {"bfloat16": "bfloat16", "float16": "float16"}[dtype]
    graph = f"({kind}[batch, 4] x) => ({kind}[batch, 4] y) {{ y = Identity(x) }}"
    x, y = (TensorSpec(name=name, dtype=said, shape=("batch", 4)) for name in "xy")
    return engine_of(folder, like, graph, [x], y, {"x": ((1, 4), (2, 4), (8, 4))})


def batch(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)


def on_gpu(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(batch(rows, seed), device="cuda")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt:cuda_graph"])
def test_the_callers_stream_orders_the_work_on_tensors(simulated: Simulated, make: Make, backend: str) -> None:
    if backend != "tensorrt" and "pycuda" in cuda.LIBRARIES:
        pytest.skip("pycuda has no graphs")
    with deploy.load(make(), backend) as session:
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                for seed in range(3):
                    late = torch.zeros(3, 4, device="cuda")
                    torch.cuda._sleep(1000)
                    late.copy_(on_gpu(3, seed))
                    doubled = session(session(late))  # dropped at once: its memory goes to the next tensor
                    late.zero_()
                    np.testing.assert_array_equal(doubled.cpu().numpy(), 4 * batch(3, seed))


def test_a_run_waits_for_nothing_on_the_host_whichever_stream_the_caller_uses(simulated: Simulated, make: Make) -> None:
    if "pycuda" in cuda.LIBRARIES:
        pytest.skip("pycuda waits for streams of other libraries on the host")
    with deploy.load(make()) as session:
        x, y = on_gpu(2), torch.empty(2, 4, device="cuda")
        session.run({"x": x}, {"y": y})
        before = dict(simulated.machine.calls)
        session.run({"x": x}, {"y": y})
        done = {name: count - before.get(name, 0) for name, count in simulated.machine.calls.items()}
        of_cuda = {name: count for name, count in done.items() if count and name != "record_stream"}
        assert of_cuda == {"cudaGetDevice": 1, "cudaEventRecord": 2, "cudaStreamWaitEvent": 2, "execute_async_v3": 1}


@pytest.mark.parametrize("stream", [None, 1, 2])
def test_arrays_of_other_libraries_go_in_and_come_out(simulated: Simulated, make: Make, stream: int | None) -> None:
    with deploy.load(make()) as session:
        x = batch(4)
        result = session(simulated.array(x, stream=stream))
        assert isinstance(result, DeviceArray)
        again = session(result)  # what came out goes in
        del result
        np.testing.assert_array_equal(again.numpy(), 4 * x)
        np.testing.assert_array_equal(session(simulated.array(x, offset=16)).numpy(), 2 * x)  # an odd address


def test_results_are_handed_over_by_dlpack(simulated: Simulated, make: Make) -> None:
    with deploy.load(make()) as session:
        result = session(simulated.array(batch(3)))
        found = view("'y'", result)
        by_dlpack = view("'y'", OnlyDLPack(result))
        assert (by_dlpack.pointer, by_dlpack.shape, by_dlpack.dtype) == (found.pointer, (3, 4), "float32")
        assert by_dlpack.index == 0
        np.testing.assert_array_equal(session(OnlyDLPack(result)).numpy(), 4 * batch(3))
        with pytest.raises(BufferError, match="handed over where it is"):
            result.__dlpack__(copy=True)
        with pytest.raises(BufferError, match="handed over where it is"):
            result.__dlpack__(dl_device=(1, 0))


class OnlyDLPack:
    """An array that knows DLPack alone."""

    def __init__(self, array: DeviceArray) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


def test_a_run_where_addresses_stand_takes_six_calls_of_cuda(simulated: Simulated, make: Make) -> None:
    with deploy.load(make()) as session:
        feed, out = {"x": on_gpu(3)}, {"y": torch.zeros(3, 4, device="cuda")}
        session.run(feed, out)
        before = simulated.machine.calls.copy()
        session.run(feed, out)
        found = simulated.machine.calls - before
    del found["record_stream"]  # torch's, which calls nothing
    assert sum(found.values()) == 6, found


def test_outputs_are_written_to_the_arrays_of_out_without_a_copy(simulated: Simulated, make: Make) -> None:
    with deploy.load(make()) as session:
        x, y = on_gpu(3), torch.zeros(3, 4, device="cuda")
        allocated = simulated.machine.calls["torch_allocate"]
        assert session.run({"x": x}, {"y": y})["y"] is y
        np.testing.assert_array_equal(y.cpu().numpy(), 2 * batch(3))
        assert simulated.machine.calls["torch_allocate"] == allocated
        target = session.to_device({"x": batch(3)})["x"]  # type: ignore[attr-defined]
        assert session.run({"x": simulated.array(batch(3, seed=1))}, {"y": target})["y"] is target
        np.testing.assert_array_equal(target.numpy(), 2 * batch(3, seed=1))
        odd = torch.zeros(13, device="cuda")[1:].view(3, 4)
        session.run({"x": x}, {"y": odd})
        np.testing.assert_array_equal(odd.cpu().numpy(), 2 * batch(3))


def test_arrays_of_out_that_do_not_fit_are_refused_before_anything_runs(simulated: Simulated, make: Make) -> None:
    with deploy.load(make()) as session:
        x = on_gpu(3)
        for target, message in (
            (torch.zeros(2, 4, device="cuda"), r"out\['y'\] has shape 2x4; expected 3x4"),
            (torch.zeros(3, 4, device="cuda", dtype=torch.float16), r"out\['y'\] is torch.float16; expected y: float32"),
            (torch.zeros(3, 4), r"out\['y'\] is on cpu; this session is on cuda:0"),
            (torch.zeros(4, 3, device="cuda").t(), r"out\['y'\] is not contiguous"),
            (batch(3), r"out\['y'\] is a ndarray; expected a torch tensor"),
        ):
            with pytest.raises(InputError, match=message):
                session.run({"x": x}, {"y": target})
        with pytest.raises(InputError, match="unknown output 'z' in out; expected one of y"):
            session.run({"x": x}, {"z": x})
        given = simulated.array(batch(3))
        for target, message in (
            (batch(3), r"out\['y'\] is a ndarray; expected an array on the GPU"),
            (simulated.array(batch(2)), r"out\['y'\] has shape 2x4; expected 3x4"),
            (simulated.array(batch(3).astype(np.float16)), r"out\['y'\] is float16; expected y: float32"),
        ):
            with pytest.raises(InputError, match=message):
                session.run({"x": given}, {"y": target})
        assert simulated.machine.calls["execute_async_v3"] == 0
        np.testing.assert_array_equal(session(x).cpu().numpy(), 2 * batch(3))


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt:cuda_graph"])
def test_outputs_whose_shape_depends_on_data(simulated: Simulated, make: Make, backend: str) -> None:
    with deploy.load(make(outputs=("y", "positive")), backend) as session:
        for seed, rows in enumerate((3, 8, 1)):
            x = batch(rows, seed)
            for given, found in ((x, np.asarray), (on_gpu(rows, seed), to_numpy), (simulated.array(x), to_numpy)):
                result = session.run({"x": given})
                np.testing.assert_array_equal(found(result["positive"]), x[x > 0])
                np.testing.assert_array_equal(found(result["y"]), 2 * x)


def to_numpy(array: Any) -> np.ndarray:
    return array.numpy() if isinstance(array, DeviceArray) else array.cpu().numpy()  # type: ignore[no-any-return]


def test_bfloat16_goes_in_and_out_as_torch_tensors_and_by_dlpack(simulated: Simulated, make: Make, tmp_path: Path) -> None:
    with deploy.load(copying(tmp_path, make(), "bfloat16", "bfloat16")) as session:
        x = torch.from_numpy(batch(3)).to(torch.bfloat16)
        for given in (x, x.cuda()):
            result = session(given)
            assert (result.dtype, result.device.type) == (torch.bfloat16, given.device.type)
            assert torch.equal(result.cpu(), x)
        array = DeviceArray(Held(given), (3, 4), "bfloat16", session._gpu)  # type: ignore[attr-defined]
        result = session(array)
        assert (result.dtype, view("'y'", result).dtype) == ("bfloat16", "bfloat16")
        assert not hasattr(result, "__cuda_array_interface__")
        again = session(result)
        target = torch.zeros_like(given)
        session.run({"x": again}, {"y": DeviceArray(Held(target), (3, 4), "bfloat16", session._gpu)})  # type: ignore[attr-defined]
        assert torch.equal(target.cpu(), x)
        with pytest.raises(InputError, match="numpy has no bfloat16"):
            result.numpy()
        session.warmup(runs=1)
        with pytest.raises(InputError, match=r"'x' is float32; expected x: bfloat16|returns bfloat16, which numpy lacks"):
            session(batch(3))


class Held(Memory):
    """The memory of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.pointer, self.nbytes = tensor.data_ptr(), tensor.nbytes

    def write(self, host: np.ndarray, stream: Stream, offset: int = 0) -> None: ...

    def read(self, host: np.ndarray, stream: Stream) -> None: ...


def test_inputs_that_decide_on_shapes_are_read_on_the_host(simulated: Simulated, tmp_path: Path, make: Make) -> None:
    specs = [TensorSpec(name="x", dtype="float32", shape=("batch", 4)), TensorSpec(name="n", dtype="int64", shape=(2,))]
    y = TensorSpec(name="y", dtype="float32", shape=("rows", "width"))
    graph = "(float[batch, 4] x, int64[2] n) => (float[rows, width] y) { y = Tile(x, n) }"
    ranges: Ranges = {"x": ((1, 4), (2, 4), (8, 4)), "n": ((2,), (2,), (2,))}
    with deploy.load(engine_of(tmp_path, make(), graph, specs, y, ranges)) as session:
        x = batch(2)
        for times in (3, 1, 2, 2):
            n = np.array([times, 1], np.int64)
            expected = np.tile(x, (times, 1))
            np.testing.assert_array_equal(session.run({"x": x, "n": n})["y"], expected)
            for shape in (n, torch.from_numpy(n), torch.from_numpy(n).cuda()):
                np.testing.assert_array_equal(session.run({"x": on_gpu(2), "n": shape})["y"].cpu().numpy(), expected)
            np.testing.assert_array_equal(session.run({"x": simulated.array(x), "n": n})["y"].numpy(), expected)
        with pytest.raises(InputError, match="the feed mixes"):
            session.run({"x": simulated.array(x), "n": torch.from_numpy(n)})


def test_empty_arrays_are_taken_and_copied(simulated: Simulated, make: Make) -> None:
    with deploy.load(make()) as session:
        empty = session.to_device({"x": np.zeros((0, 4), np.float32)})["x"]  # type: ignore[attr-defined]
        assert empty.numpy().shape == (0, 4)
        with pytest.raises(InputError, match="'batch' must be 1 or more"):
            session(torch.zeros(0, 4, device="cuda"))


def test_arrays_on_another_gpu_and_of_another_dtype_are_refused(simulated: Simulated, make: Make) -> None:
    with deploy.load(make()) as session:
        with pytest.raises(InputError, match="'x' is on cuda:1; this session is on cuda:0: move it, or open one there"):
            session(torch.empty(2, 4, device="cuda:1"))
        if "pycuda" not in cuda.LIBRARIES:  # which cannot tell
            with pytest.raises(InputError, match="'x' is on cuda:1; this session is on cuda:0"):
                session(simulated.array(batch(2), index=1))
        lying = simulated.array(batch(2).astype(np.float16))
        lying.dtype = np.dtype(np.float32)
        with pytest.raises(InputError, match="'x' is float16; expected x: float32"):
            session(lying)


def test_a_session_on_the_second_gpu_leaves_the_threads_gpu_as_it_was(simulated: Simulated, make: Make) -> None:
    with deploy.load(make(), device="cuda:1") as session:
        assert simulated.machine.here.device == 0
        np.testing.assert_array_equal(session(batch(2)), 2 * batch(2))
        with torch.cuda.device(1):
            result = session(torch.tensor(batch(2), device="cuda:1")).cpu()
        np.testing.assert_array_equal(result.numpy(), 2 * batch(2))
        assert simulated.machine.here.device == 0


def test_an_engine_with_other_dtypes_than_the_manifest_is_refused(simulated: Simulated, make: Make, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="has 'x' in float16; the manifest lists x: float32"):
        deploy.load(copying(tmp_path, make(), "float16", "float32"))


def test_everything_is_given_back_whichever_thread_lets_go_of_it(simulated: Simulated, make: Make) -> None:
    session = deploy.load(make())
    kept = [session(on_gpu(2)), session(simulated.array(batch(2))), session(batch(2))]
    thread = threading.Thread(target=session.close)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(kept[1].numpy(), 2 * batch(2))  # it outlives the session
    kept.clear()
    gc.collect()
    assert not simulated.held()
    assert not simulated.pycuda.leaked
