"""A machine that is as busy as a test wants: texts of proc(5) as one was found with, their counters running on."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest

from deploy.evidence import disturbance
from deploy.host import cpu_use
from deploy.host.core_probe import CoreProbe, CoreState

STAT = """\
cpu  6114912 658733 1056876 2258097 52113 0 9041 11347 0 0
cpu0 2784327 348661 486151 1436923 14076 0 2883 5637 0 0
cpu1 3330585 310072 570724 821174 38037 0 6158 5709 0 0
ctxt 103330194
btime 1795639176
processes 753732
procs_running 18
procs_blocked 0
"""
"""Of a machine with two processors, the lines of interrupts left out."""

SCHEDSTAT = "6712439021 318722104 5210\n"
"""Nanoseconds that a thread ran and waited, and how often it was put on a processor."""

CORES = CoreState(step_ns=10.9, handoff_us=0.16)
"""Of two cores that share a cache and serve nobody else."""


def stat(idle_s: float, stolen_s: float = 0.0) -> str:
    """`STAT` so many seconds of each processor later, for the processors that this process may run on."""
    _, line, *_, last = STAT.splitlines()
    values = line.split()[1:]
    values[3] = str(int(values[3]) + int(100 * idle_s))
    values[7] = str(int(values[7]) + int(100 * stolen_s))
    return "\n".join([STAT.splitlines()[0], *(" ".join([f"cpu{cpu}", *values]) for cpu in sorted(os.sched_getaffinity(0))), last])


@contextmanager
def processors(*, others: float = 0.0, waiting: float = 0.0, cores: Iterable[CoreState] = (CORES,)) -> Iterator[None]:
    """Let the kernel count `others` cores used by other programs, and every process waiting for one in this share of the time.

    cores: what they are like, one measurement after the other, and again. Everything above the files of proc(5) and that is real.
    """
    states = cycle(cores)
    start = time.monotonic()
    idle = 1 - others / len(os.sched_getaffinity(0))

    def text(path: str) -> str:
        passed_s = time.monotonic() - start
        if path == "/proc/stat":
            return stat(idle * passed_s)
        _, _, pid, _, thread, name = path.split("/")
        if name == "schedstat":
            ran, waited, times = map(int, SCHEDSTAT.split())
            return f"{ran} {waited + int(waiting * passed_s * 1e9) * (pid == thread)} {times}\n"
        return Path(path).read_text(encoding="ascii")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_use, "proc_text", text)
        patch.setattr(cpu_use, "_used_s", lambda pid: 0.0)
        patch.setattr(CoreProbe, "measure", lambda probe: next(states))
        patch.setattr(disturbance, "best_known", lambda: None)
        patch.setattr(disturbance, "remember", lambda state: None)
        yield
