"""torch's caching allocators: blocks belong to the stream that was current, and are handed on as soon as no tensor has them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from tests.simulator.allocation import claim
from tests.simulator.captures import Capture
from tests.simulator.errors import CudaError, RuleError
from tests.simulator.machine import Machine
from tests.simulator.memory import Allocation, Segment, site
from tests.simulator.work import Clock, Stream, Work, join


@dataclass(eq=False)
class Block:
    """Memory of a tensor. used_by: the streams of `record_stream`. capture: it comes from the private pool of a graph."""

    owner: Allocation
    stream: Stream
    capture: Capture | None
    used_by: list[Stream] = field(default_factory=list)


class CachingAllocator:
    """Source: pytorch.org, CUDA semantics, "Memory management", and `torch.Tensor.record_stream`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.space = machine.space
        self.free: dict[Stream, list[Segment]] = defaultdict(list)
        self.private: dict[Capture, list[Segment]] = defaultdict(list)
        self.waiting: list[tuple[Segment, Stream, list[tuple[Work | None, Clock]]]] = []
        self.allocated = 0

    def allocate(self, nbytes: int, stream: Stream) -> Block:
        """Raises CudaError if there is no room even after all that is cached was given back."""
        self._collect()
        join(stream.clock, self.machine.host)
        cached = self.free[stream] if stream.capture is None else self.private[stream.capture]
        segment = next((s for s in reversed(cached) if nbytes <= s.size <= max(2 * nbytes, 1024)), None)
        if segment is not None:
            cached.remove(segment)
        else:
            segment = self._new(nbytes, stream)
        owner = self.space.own(segment, nbytes, stream.device, f"a torch tensor made on {stream.name} at {site()}")
        if stream.capture is None:
            claim(stream, owner, f"the allocation of {owner.label}", stream.clock.get(stream.name, 0))
        self.allocated += segment.size
        return Block(owner, stream, stream.capture)

    def _new(self, nbytes: int, stream: Stream) -> Segment:
        try:
            return self.space.segment(nbytes, stream.device)
        except CudaError:
            if stream.capture is not None or self.machine.captures:
                raise
            self.empty_cache(stream.device)
            return self.space.segment(nbytes, stream.device)

    def give_back(self, block: Block) -> None:
        """The last tensor on it is gone: it is free in the order of its stream, and of those that were recorded."""
        segment, label = block.owner.segment, f"torch at {site()}"
        known = dict(block.stream.clock)
        for other in (self.machine.host, *(stream.clock for stream in block.used_by)):
            join(known, other)
        try:
            segment.check(0, segment.size, True, known, f"another tensor that is handed the memory of {block.owner.label}")
        except RuleError as error:
            self.machine.blame(RuleError(f"{error}; neither record_stream nor a wait of {block.stream.name} says so"))
            segment.history.clear()  # said once
        block.owner.freed = label
        self.allocated -= segment.size
        others = [stream for stream in block.used_by if stream is not block.stream]
        if block.capture is not None:
            self.private[block.capture].append(segment)
        elif others:
            events = [(stream.last, dict(stream.clock)) for stream in others]
            self.waiting.append((segment, block.stream, events))
        else:
            self.free[block.stream].append(segment)

    def _collect(self) -> None:
        """Take back what other streams are done with."""
        still = []
        for segment, stream, events in self.waiting:
            if any(work is not None and not work.done for work, _ in events):
                still.append((segment, stream, events))
                continue
            for _, clock in events:
                join(self.machine.host, clock)
            self.free[stream].append(segment)
        self.waiting = still

    def empty_cache(self, device: int) -> None:
        """Give what no tensor has back to the device; cudaFree waits for it."""
        if not any(stream.device == device for stream in (*self.free, *(stream for _, stream, _ in self.waiting))):
            return
        self.machine.unsafe("cudaFree of torch's cache")
        self.machine.synchronize_device(device)
        self._collect()
        for stream, segments in self.free.items():
            if stream.device == device:
                for segment in segments:
                    self.space.release(segment, device)
                segments.clear()

    def drop_pool(self, capture: Capture) -> None:
        """The graph is gone: its private memory is free."""
        for segment in self.private.pop(capture, []):
            self.free[capture.origin].append(segment)


class HostAllocator:
    """Pinned memory, which is not handed on before the copies that torch was told of are over."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.waiting: list[tuple[Allocation, list[Work]]] = []

    def allocate(self, nbytes: int) -> Allocation:
        self._collect()
        space = self.machine.space
        return space.own(space.segment(nbytes, None), nbytes, None, f"torch's pinned memory at {site()}")

    def give_back(self, owner: Allocation) -> None:
        owner.freed = f"torch at {site()}"
        self.waiting.append((owner, [use.work for use in owner.segment.history]))
        self._collect()

    def _collect(self) -> None:
        still = []
        for owner, works in self.waiting:
            if all(work.done for work in works):
                self.machine.space.release(owner.segment, None)
            else:
                still.append((owner, works))
        self.waiting = still
