"""The part of CUDA that engines need, on a GPU, without TensorRT: memory, streams, events, graphs, arrays of torch."""

import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from deploy.engine import cuda
from deploy.engine.cuda import LEGACY, Device, DeviceMemoryError
from deploy.engine.cuda.arrays import DeviceArray, copied, view
from deploy.errors import BackendError


@pytest.fixture(params=["cuda-python", "pycuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    pytest.importorskip({"cuda-python": "cuda.bindings.runtime", "pycuda": "pycuda.driver"}[request.param])
    monkeypatch.setattr(cuda, "LIBRARIES", {request.param: cuda.LIBRARIES[request.param]})
    torch.zeros(1, device="cuda")
    found = cuda.open_device(torch.cuda.current_device())
    with found.active():
        yield found


def test_the_gpu_is_the_one_that_torch_has(device: Device) -> None:
    major, minor = torch.cuda.get_device_capability()
    assert device.gpu().compute_capability == f"{major}.{minor}"
    assert device.gpu().name == torch.cuda.get_device_name()
    assert device.count == torch.cuda.device_count()
    free, total = device.memory()
    assert 0 < free < total == torch.cuda.mem_get_info()[1]


def test_bytes_go_to_the_gpu_and_back_in_the_order_of_a_stream(device: Device) -> None:
    stream = device.stream()
    host, back = device.pinned(1000), device.pinned(1000)
    host[:] = np.arange(1000) % 251
    first, second = device.allocate(1000, stream), device.allocate(1000, stream)
    first.write(host[500:], stream, 500)
    first.write(host[:500], stream)
    device.copy(second.pointer, first.pointer, 1000, stream)
    second.read(back, stream)
    stream.synchronize()
    np.testing.assert_array_equal(back, host)
    assert first.pointer % 256 == second.pointer % 256 == 0


def test_a_stream_waits_for_torchs_and_torchs_for_it(device: Device) -> None:
    own, event = device.stream(), device.event()
    for torch_stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        caller = device.external(torch_stream.cuda_stream)
        with torch.cuda.stream(torch_stream):
            late = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
            result = torch.zeros_like(late)
            torch.cuda._sleep(50_000_000)
            late.fill_(7)
            event.record(caller)
            event.hold(own)
            device.copy(result.data_ptr(), late.data_ptr(), late.nbytes, own)
            event.record(own)
            event.hold(caller)
            late.zero_()
            assert bool((result == 7).all())


def test_times_of_events_are_those_of_the_gpu(device: Device) -> None:
    stream = torch.cuda.Stream()
    marks = [device.event(timed=True) for _ in range(2)]
    ours = device.external(stream.cuda_stream)
    marks[0].record(ours)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
    marks[1].record(ours)
    stream.synchronize()
    if device.library == "cuda-python":  # pycuda waits for a stream of torch's, and marks another
        assert 1 < marks[1].since(marks[0]) < 1000


def test_memory_is_freed_in_the_order_of_its_stream_and_reused(device: Device) -> None:
    stream = device.stream()
    device.allocate(1 << 20, stream)
    free, _ = device.memory()
    for _ in range(100):
        device.allocate(64 << 20, stream)
    stream.synchronize()
    assert device.memory()[0] > free - (200 << 20)
    device.trim()
    stream.synchronize()
    device.trim()
    assert device.memory()[0] > free - (64 << 20)


def test_out_of_memory_is_an_error_with_figures_and_nothing_is_broken_by_it(device: Device) -> None:
    stream = device.stream()
    _, total = device.memory()
    with pytest.raises(DeviceMemoryError) as caught:
        device.allocate(2 * total, stream)
    assert (caught.value.needed, caught.value.total) == (2 * total, total)
    assert device.allocate(1000, stream).pointer
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_work_is_captured_and_replayed_and_a_failed_capture_leaves_all_as_it_was(device: Device) -> None:
    if device.library == "pycuda":
        with pytest.raises(BackendError, match="pycuda has no CUDA graphs"):
            device.capture(lambda: None, device.stream())
        return
    stream = device.stream()
    source, target = (torch.zeros(1000, dtype=torch.uint8, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    graph = device.capture(lambda: device.copy(target.data_ptr(), source.data_ptr(), 1000, stream), stream)
    for value in (3, 4):
        source.fill_(value)
        torch.cuda.synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert bool((target == value).all())

    def wait() -> None:
        device.copy(target.data_ptr(), source.data_ptr(), 1000, stream)
        stream.synchronize()

    current = torch.cuda.current_stream()
    with pytest.raises(BackendError, match=r"CUDA failed: .*captur"):
        device.capture(wait, stream)
    with pytest.raises(ValueError, match="by the work itself"):
        device.capture(_fail, stream)
    stream.synchronize()
    graph.launch(stream)
    stream.synchronize()
    assert torch.cuda.current_stream() == current


def _fail() -> None:
    raise ValueError("by the work itself")


def test_captures_of_many_threads_and_torchs_allocations_beside_them_do_not_meet(device: Device) -> None:
    if device.library == "pycuda":
        pytest.skip("pycuda has no CUDA graphs")
    errors: list[BaseException] = []

    def capture() -> None:
        try:
            with device.active():
                stream = device.stream()
                memory = device.allocate(4096, stream)
                for _ in range(50):
                    graph = device.capture(lambda: device.copy(memory.pointer, memory.pointer + 2048, 2048, stream), stream)
                    graph.launch(stream)
                stream.synchronize()
        except BaseException as error:
            errors.append(error)

    def use_torch() -> None:
        try:
            for size in range(1, 200):
                assert torch.ones(size << 10, device="cuda").sum().item() == size << 10
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for work in (capture, capture, capture, use_torch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_what_is_released_on_another_thread_is_given_back(device: Device) -> None:
    held = [device.stream(), device.event(), device.pinned(100), device.allocate(100, device.external(LEGACY))]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    device.stream().synchronize()


def test_what_is_dropped_amid_a_capture_does_not_end_it(device: Device) -> None:
    if device.library == "pycuda":
        pytest.skip("pycuda has no CUDA graphs")
    stream, other = device.stream(), device.stream()
    held = [device.stream(), device.event(), device.pinned(100), device.allocate(100, other)]
    held.append(device.capture(lambda: None, stream))
    source, target = (torch.full((1000,), value, dtype=torch.uint8, device="cuda") for value in (5, 0))
    torch.cuda.synchronize()

    def work() -> None:
        held.clear()
        gc.collect()
        device.copy(target.data_ptr(), source.data_ptr(), 1000, stream)

    device.capture(work, stream).launch(stream)
    stream.synchronize()
    assert bool((target == 5).all())


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool"])
def test_arrays_go_to_torch_and_come_from_it(device: Device, dtype: str) -> None:
    host = np.arange(12).reshape(3, 4).astype(dtype)
    array = copied(host, device)
    np.testing.assert_array_equal(array.numpy(), host)
    by_dlpack, by_interface = torch.from_dlpack(array), torch.as_tensor(array, device="cuda")
    assert by_dlpack.data_ptr() == by_interface.data_ptr() == array._memory.pointer
    assert by_dlpack.device == torch.device("cuda", device.index)
    del array
    gc.collect()
    np.testing.assert_array_equal(by_dlpack.cpu().numpy(), host)  # torch keeps the memory
    found = view("'x'", by_dlpack)
    assert (found.pointer, found.shape, found.dtype) == (by_dlpack.data_ptr(), (3, 4), dtype)
    assert device.owner(found.pointer) in (device.index, None)


def test_bfloat16_goes_to_torch_by_dlpack(device: Device) -> None:
    x = torch.randn(5, dtype=torch.bfloat16, device="cuda")
    stream = device.external(LEGACY)
    memory = device.allocate(x.nbytes, stream)
    device.copy(memory.pointer, x.data_ptr(), x.nbytes, stream)
    stream.synchronize()
    assert torch.equal(torch.from_dlpack(DeviceArray(memory, (5,), "bfloat16", device)), x)
