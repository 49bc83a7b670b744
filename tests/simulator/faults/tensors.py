"""Mistakes with torch's tensors."""

from __future__ import annotations

import torch

from tests.simulator.faults.fault import Fixture, fault


@fault("neither record_stream nor a wait")
def to_drop_a_tensor_that_another_stream_uses(f: Fixture) -> None:
    x, stream = torch.ones(4, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.mul_(2)
    del x


@fault("which is written by the allocation of a torch tensor")
def to_use_a_tensor_on_a_stream_it_was_not_allocated_for(f: Fixture) -> None:
    torch.ones(4, device="cuda").add_(1)  # the default stream has work to do
    x = torch.empty(4, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        x.fill_(1)


@fault("which is written by aten.fill_")
def to_give_the_engine_a_tensor_that_is_not_ready(f: Fixture) -> None:
    x = torch.empty(8, 4, device="cuda").fill_(1)
    context = f.context()
    context.set_tensor_address("x", x.data_ptr())
    context.execute_async_v3(f.stream())
    f.do("cudaDeviceSynchronize")


@fault("no ordering: aten.mul")
def to_take_a_result_of_the_engine_without_waiting(f: Fixture) -> None:
    y, stream = torch.zeros(2, 4, device="cuda"), f.stream()
    torch.cuda.synchronize()
    context = f.context()
    context.set_tensor_address("y", y.data_ptr())
    context.execute_async_v3(stream)
    try:
        y * 2
    finally:
        torch.cuda.synchronize()


@fault("the host changed pinned memory")
def to_change_pinned_memory_that_torch_copies(f: Fixture) -> None:
    host = torch.ones(4, pin_memory=True)
    host.cuda(non_blocking=True)
    host.fill_(2)
    torch.cuda.synchronize()
