"""Who uses the processors: the time that programs use of them and wait for them, as proc(5) counts it."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

_CPUCLOCK_SCHED = 2  # clock_getcpuclockid(3): the CPU time of a process, its ended threads included
_PART = 1 << 16
_FIELDS = 8
"""Of a line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal. Guests are counted in user."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The counters at one moment.

    at_s: of the monotonic clock. cpus: how many this process may run on. idle_s, stolen_s: seconds in which these were idle, and in which
    a hypervisor ran something else on them (steal), in steps of `tick_s`; None where /proc/stat does not have them. used_s: CPU seconds
    of this process and its descendants, by process. waited_s: seconds in which the threads of the watched process were ready to run and
    waited for a processor, by thread; None where the kernel does not count them.
    """

    at_s: float
    cpus: int
    idle_s: float | None
    stolen_s: float | None
    used_s: dict[int, float]
    waited_s: dict[int, float] | None


def tick_s() -> float:
    """The seconds in a step of /proc/stat."""
    return 1 / os.sysconf("SC_CLK_TCK")


def take_reading(watched: int) -> Reading:
    """The counters now, with the waits of the threads of the process `watched`."""
    cpus = os.sched_getaffinity(0)
    times = _machine(cpus)
    return Reading(
        at_s=time.monotonic(),
        cpus=len(cpus),
        idle_s=times and times[0],
        stolen_s=times and times[1],
        used_s={pid: used for pid in _tree(os.getpid()) if (used := _used_s(pid)) is not None},
        waited_s=_waits(watched),
    )


def _machine(cpus: set[int]) -> tuple[float, float] | None:
    """The idle and stolen seconds of these CPUs together; None unless the kernel counts all of them.

    In a container /proc/stat is the host's, and so are the numbers of the CPUs: programs outside the container count too.
    """
    try:
        lines = proc_text("/proc/stat").splitlines()
    except OSError:
        return None
    counts = {}
    for line in lines:
        name, *values = line.split()
        if name[3:].isdigit() and name.startswith("cpu") and int(name[3:]) in cpus:
            counts[int(name[3:])] = [int(value) for value in values[:_FIELDS]]
    if set(counts) != cpus or any(len(values) < _FIELDS or not sum(values) for values in counts.values()):
        return None  # as in gVisor, whose counts are zeros
    _, _, _, idle, waiting, _, _, stolen = (sum(column) * tick_s() for column in zip(*counts.values(), strict=True))
    return idle + waiting, stolen


def _waits(pid: int) -> dict[int, float] | None:
    """The seconds that each thread of a process has waited for a processor; None unless the kernel counts them."""
    waits, ran = {}, 0
    for thread in _threads(pid):
        with contextlib.suppress(OSError):  # it has just ended, or there is no such file
            run_ns, wait_ns, _ = map(int, proc_text(f"/proc/{pid}/task/{thread}/schedstat").split())
            waits[thread] = wait_ns / 1e9
            ran += run_ns
    return waits if ran else None  # a kernel that does not count has no such file, or zeros


def _tree(pid: int) -> Iterator[int]:
    """The process and its descendants; only the process where the kernel does not tell children."""
    yield pid
    for thread in _threads(pid):
        with contextlib.suppress(OSError):  # it has just ended, or children are not told
            for child in proc_text(f"/proc/{pid}/task/{thread}/children").split():
                yield from _tree(int(child))


def _threads(pid: int) -> list[int]:
    """The threads of a process; none where it has ended."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _used_s(pid: int) -> float | None:
    """The CPU seconds of a process; None where it has ended."""
    try:
        return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    except OSError:
        return None


def proc_text(path: str) -> str:
    """What is in a file of /proc. By its descriptor: a reading is some dozens of them, and Python's files take four times as long."""
    file = os.open(path, os.O_RDONLY)
    try:
        return b"".join(iter(lambda: os.read(file, _PART), b"")).decode("ascii", "replace")
    finally:
        os.close(file)
