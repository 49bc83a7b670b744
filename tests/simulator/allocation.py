"""CUDA's ways to allocate: cudaMalloc, cudaMallocAsync, and pinned host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulator.errors import CudaError, RuleError
from tests.simulator.memory import POISON, Access, Allocation, Segment, site
from tests.simulator.work import Stream, Work

if TYPE_CHECKING:
    from tests.simulator.machine import Machine


Place = tuple[int, int]
"""A device, and a memory pool on it."""


class Allocator:
    """What cudaMalloc and its kin do."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.space = machine.space
        self.pools: set[int] = set()
        """Those of cudaMemPoolCreate; the default pool of a device has its number."""
        self._free: list[tuple[Segment, Place, str, int]] = []  # with the stream that gave it back, and its tick
        self._places: dict[Allocation, Place] = {}

    def malloc(self, nbytes: int) -> Allocation:
        """cudaMalloc."""
        self.machine.unsafe("cudaMalloc")
        device = self.machine.here.device
        return self.space.own(self.space.segment(nbytes, device), nbytes, device, f"cudaMalloc at {site()}")

    def free(self, address: int) -> None:
        """cudaFree, which waits for all work of the device."""
        owner = self._owned(address, "cudaFree")
        if owner.device is None:
            raise CudaError("cudaErrorInvalidValue")
        self.machine.unsafe("cudaFree")
        if not self.machine.captures:
            self.machine.synchronize_device(owner.device)
        owner.freed = f"cudaFree at {site()}"
        self.space.release(owner.segment, owner.device)

    def malloc_async(self, nbytes: int, stream: Stream, pool: int | None = None) -> Allocation:
        """cudaMallocAsync: what was given back in the order of the same stream is handed on at once."""
        if stream.capture is not None:
            raise RuleError("not modelled: an allocation becomes part of a graph")
        self.machine.unsafe("cudaMallocAsync")
        if pool is not None and pool >= self.machine.devices and pool not in self.pools:
            raise RuleError(f"there is no memory pool {pool:#x}")
        self.machine.refuse_implicit(stream)
        place = (stream.device, stream.device if pool is None else pool)
        label = f"cudaMallocAsync on {stream.name} at {site()}"
        tick = _step(self.machine, stream)
        segment = self._from_pool(nbytes, place, stream)
        if segment is None:
            segment = self.space.segment(nbytes, stream.device)
        owner = self.space.own(segment, nbytes, stream.device, label)
        self._places[owner] = place
        claim(stream, owner, label, tick)
        return owner

    def _from_pool(self, nbytes: int, place: Place, stream: Stream) -> Segment | None:
        """Memory that is known to the stream to be free: the newest that fits and is not four times too large."""
        for entry in reversed(self._free):
            segment, where, actor, tick = entry
            fits = nbytes <= segment.size <= max(4 * nbytes, 2048) and where == place
            if fits and stream.clock.get(actor, 0) >= tick:
                self._free.remove(entry)
                return segment
        return None

    def free_async(self, address: int, stream: Stream) -> None:
        """cudaFreeAsync: all work on it must come before, in the order of the stream."""
        owner = self._owned(address, "cudaFreeAsync")
        label = f"cudaFreeAsync on {stream.name} at {site()}"
        if stream.capture is not None:
            raise CudaError("cudaErrorInvalidValue")
        self.machine.unsafe("cudaFreeAsync")
        claim(stream, owner, label, _step(self.machine, stream))
        owner.freed = label
        self._free.append((owner.segment, self._places.pop(owner), stream.name, stream.clock[stream.name]))

    def malloc_host(self, nbytes: int) -> Allocation:
        """cudaMallocHost."""
        self.machine.unsafe("cudaMallocHost")
        return self.space.own(self.space.segment(nbytes, None), nbytes, None, f"cudaMallocHost at {site()}")

    def free_host(self, address: int) -> None:
        """cudaFreeHost: it is not said to wait, so that the host must know the work on it to be over."""
        owner = self._owned(address, "cudaFreeHost")
        if owner.device is not None:
            raise CudaError("cudaErrorInvalidValue")
        self.machine.unsafe("cudaFreeHost")
        label = f"cudaFreeHost at {site()}"
        owner.segment.check(0, owner.segment.size, True, self.machine.host, label)
        owner.freed = label
        self.space.release(owner.segment, None)

    def _owned(self, address: int, label: str) -> Allocation:
        owner = self.space.find(address, 0, f"{label} at {site()}")
        if owner.address != address:
            raise CudaError("cudaErrorInvalidValue")
        return owner

    def trim(self, pool: int) -> None:
        """cudaMemPoolTrimTo: what the host knows to be free goes back to the device."""
        kept = []
        for entry in self._free:
            segment, (device, where), actor, tick = entry
            if where == pool and self.machine.host.get(actor, 0) >= tick:
                self.space.release(segment, device)
            else:
                kept.append(entry)
        self._free = kept

    def destroy_pool(self, pool: int) -> None:
        """cudaMemPoolDestroy: allocations that are there still keep it alive; what is free goes once work on it is over."""
        self.pools.remove(pool)
        for segment, (device, where), _, _ in self._free:
            if where == pool:
                self.space.release(segment, device)
        self._free = [entry for entry in self._free if entry[1][1] != pool]


def claim(stream: Stream, owner: Allocation, label: str, tick: int) -> None:
    """Let memory change hands in the order of a stream, at its `tick`: who uses it before breaks a rule, as if it were in use still."""
    segment = owner.segment
    segment.check(0, segment.size, True, stream.clock, label)
    for use in segment.history:
        use.work.finish()  # all of it may have been done by now: what the last owner left is poisoned
    segment.content[:] = POISON
    over = Work([], None)
    over.finish()
    segment.add(Access(stream.name, tick, 0, segment.size, True, label, over))


def _step(machine: Machine, stream: Stream) -> int:
    """A piece of work on a stream that does nothing; its tick."""
    stream.last = Work(machine.order(stream), None)
    tick = stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
    return tick
