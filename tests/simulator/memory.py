"""Device memory and pinned memory: who owns which addresses, who used them last, and who gave them back.

Addresses are those of one array of this process. What is known of the use of a range outlives its allocations: memory that is
handed on while work on it is pending is found when the next owner uses it.
"""

from __future__ import annotations

import bisect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tests.simulator.errors import CudaError, RuleError
from tests.simulator.work import Work

POISON = 0xCB
ALIGNMENT = 512
"""cudaMalloc aligns to at least 256 bytes, torch's allocator to 512."""

ARENA = 1 << 28
_HERE = os.path.dirname(__file__)


def site() -> str:
    """The line outside the simulator that made the call."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        (
            frame.f_code.co_filename.startswith(_HERE + os.sep + "")
            and not os.path.basename(frame.f_code.co_filename).startswith("test_")
        )
        or "/site-packages/" in frame.f_code.co_filename
        or frame.f_code.co_filename.startswith("<")
    ):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


@dataclass(eq=False)
class Access:
    """A use of bytes `start` to `stop` of a segment, as the `tick`th piece of work of `actor`."""

    actor: str
    tick: int
    start: int
    stop: int
    write: bool
    label: str
    work: Work


@dataclass(eq=False)
class Allocation:
    """An owner of a segment. device: None for pinned memory. freed: where it was given back."""

    segment: Segment
    nbytes: int
    device: int | None
    label: str
    freed: str | None = None

    @property
    def address(self) -> int:
        return self.segment.base


@dataclass(eq=False)
class Segment:
    """A range of addresses, and what is known of the use of it."""

    base: int
    content: np.ndarray
    history: list[Access] = field(default_factory=list)
    owner: Allocation | None = None

    @property
    def size(self) -> int:
        return self.content.size

    def check(self, start: int, stop: int, write: bool, clock: Mapping[str, int], label: str) -> None:
        """Raise RuleError if `clock` does not know that a use which conflicts is over."""
        for earlier in self.history:
            if earlier.stop <= start or stop <= earlier.start or not (write or earlier.write):
                continue
            if clock.get(earlier.actor, 0) < earlier.tick:
                verb = "writes" if write else "reads"
                done = "is written by" if earlier.write else "is read by"
                raise RuleError(f"no ordering: {label} {verb} {self.base + start:#x}, which {done} {earlier.label}")

    def add(self, access: Access) -> None:
        """Remember a use that was checked; what it comes after and covers need not be known any longer."""
        self.history = [
            earlier
            for earlier in self.history
            if not (
                access.start <= earlier.start
                and earlier.stop <= access.stop
                and (access.write or (not earlier.write and earlier.actor == access.actor))
            )
        ]
        self.history.append(access)

    def pending(self, start: int, stop: int) -> bool:
        """Whether work on these bytes is still to be done."""
        return any(not use.work.done and use.start < stop and start < use.stop for use in self.history)


class Space:
    """All addresses. total: bytes of device memory, of each device."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used: dict[int, int] = {}
        self._arena = np.empty(ARENA, np.uint8)
        self._next = -self._arena.ctypes.data % ALIGNMENT
        self._bases: list[int] = []
        self._segments: list[Segment] = []

    def live(self) -> list[Allocation]:
        return [segment.owner for segment in self._segments if segment.owner is not None and segment.owner.freed is None]

    def segment(self, nbytes: int, device: int | None) -> Segment:
        """New addresses. Raises CudaError if the device has no room."""
        size = max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
        if device is not None:
            if self.used.get(device, 0) + size > self.total:
                raise CudaError("cudaErrorMemoryAllocation")
            self.used[device] = self.used.get(device, 0) + size
        assert self._next + size <= ARENA, "the simulator has no addresses left"
        content = self._arena[self._next : self._next + size]
        content[:] = POISON
        self._next += size
        segment = Segment(content.ctypes.data, content)
        self._bases.append(segment.base)
        self._segments.append(segment)
        return segment

    def own(self, segment: Segment, nbytes: int, device: int | None, label: str) -> Allocation:
        segment.owner = Allocation(segment, nbytes, device, label)
        return segment.owner

    def release(self, segment: Segment, device: int | None) -> None:
        """Give the room of a segment back to the device; its addresses are never used again."""
        if device is not None:
            self.used[device] -= segment.size
        segment.content[:] = POISON

    def at(self, address: int) -> Segment | None:
        index = bisect.bisect_right(self._bases, address) - 1
        if index < 0 or address >= self._bases[index] + self._segments[index].size:
            return None
        return self._segments[index]

    def find(self, address: int, nbytes: int, label: str) -> Allocation:
        """The owner of `nbytes` at `address`. Raises RuleError if they are nobody's."""
        segment = self.at(address)
        if segment is None or segment.owner is None:
            raise RuleError(f"{label} uses {address:#x}, which was never allocated")
        owner = segment.owner
        if owner.freed is not None:
            raise RuleError(f"use after free: {label} uses {address:#x} of {owner.label}, freed by {owner.freed}")
        if address + nbytes > segment.base + max(owner.nbytes, 1):
            raise RuleError(f"{label} uses {nbytes} bytes at {address:#x}, beyond the {owner.nbytes} of {owner.label}")
        return owner

    def bytes(self, address: int, nbytes: int) -> np.ndarray:
        """The content, (nbytes,) uint8."""
        segment = self.at(address)
        assert segment is not None
        start = address - segment.base
        return segment.content[start : start + nbytes]
