"""Each planted fault is found, and what is found is reported even where the program swallows it."""

import threading
from contextlib import suppress

import numpy as np
import pytest
import torch

from tests.simulator.errors import RuleError
from tests.simulator.faults import collect
from tests.simulator.faults.fault import Fixture
from tests.simulator.simulated import Simulated

FAULTS = collect()


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_found(simulated: Simulated, name: str) -> None:
    fixture = Fixture(simulated)
    with simulated.breaks(FAULTS[name].says):
        FAULTS[name].run(fixture)


def test_the_error_names_both_sides_with_their_lines(simulated: Simulated) -> None:
    f = Fixture(simulated)
    f.set(f.x, 1, f.stream())
    with pytest.raises(RuleError) as caught:
        f.set(f.x, 2, f.stream())
    simulated.machine.violations.clear()
    assert str(caught.value).count("cudaMemsetAsync on stream 0x") == 2
    assert str(caught.value).count("(test_faults.py:") == 2


def test_an_error_that_is_swallowed_is_reported_at_the_end(simulated: Simulated) -> None:
    f = Fixture(simulated)
    f.set(f.x, 1, f.stream())
    with suppress(RuleError):
        f.set(f.x, 2, f.stream())
    with pytest.raises(AssertionError, match="no ordering"):
        simulated.finish()
    simulated.machine.violations.clear()


def test_what_is_not_given_back_is_named(simulated: Simulated) -> None:
    f = Fixture(simulated)
    before = len(simulated.held())
    f.memory()
    f.stream()
    f.event()
    f.pinned()
    a = f.stream()
    f.begin(a)
    f.end(a)
    kept = torch.ones(4, device="cuda")
    held = simulated.held()
    assert len(held) - before == 7
    for kind in ("cudaMalloc", "stream 0x", "event 0x", "cudaMallocHost", "graph 0x", "a torch tensor"):
        assert any(kind in name for name in held), kind
    del kept
    assert len(simulated.held()) - before == 6


def test_a_capture_that_is_never_ended_is_found(simulated: Simulated) -> None:
    f = Fixture(simulated)
    a = f.stream()
    f.begin(a)
    with pytest.raises(AssertionError, match="a capture was never ended"):
        simulated.finish()
    f.ask("cudaStreamEndCapture", a)


def test_what_pycuda_cannot_free_in_another_thread_is_leaked(simulated: Simulated) -> None:
    front = simulated.pycuda
    context = front.Device(0).retain_primary_context()
    context.push()
    held = [front.mem_alloc(64), front.mem_alloc(64)]
    thread = threading.Thread(target=held.pop)
    thread.start()
    thread.join()
    held.clear()
    context.pop()
    assert [name.partition(" ")[0] for name in simulated.held()] == ["cudaMalloc", "cudaMalloc"]  # still allocated, and leaked
    assert len(front.leaked) == 1


def test_a_call_can_be_made_to_fail_and_a_broken_gpu_fails_for_good(simulated: Simulated) -> None:
    f = Fixture(simulated)
    simulated.machine.fail("cudaMalloc", "cudaErrorMemoryAllocation", after=1)
    f.memory()
    assert f.ask("cudaMalloc", 64).name == "cudaErrorMemoryAllocation"
    f.memory()
    simulated.machine.sticky = "cudaErrorIllegalAddress"
    for _ in range(2):
        assert f.ask("cudaMalloc", 64).name == "cudaErrorIllegalAddress"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        torch.cuda.synchronize()


def test_numbers_come_from_the_onnx_file(simulated: Simulated) -> None:
    f = Fixture(simulated)
    a, context = f.stream(), f.context(3)
    x, y = np.arange(12, dtype=np.float32), np.zeros(12, np.float32)
    kinds = f.cudart.cudaMemcpyKind
    f.do("cudaMemcpyAsync", f.x, x.ctypes.data, x.nbytes, kinds.cudaMemcpyHostToDevice, a)
    assert context.execute_async_v3(a)
    f.do("cudaMemcpyAsync", y.ctypes.data, f.y, y.nbytes, kinds.cudaMemcpyDeviceToHost, a)
    np.testing.assert_array_equal(y, 2 * x)
