"""How fast the cores are and how far apart: what a hypervisor changes without a trace in the kernel's counters.

It moves the processors of a virtual machine as it likes: those that share a cache answer each other faster than those that do not, and
one whose sibling, the other hardware thread of a core, serves another guest runs at half the speed. Steal counts neither. The best that
the cores have been in a day is kept in the cache, so that a measurement that only sees less knows it.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy.host.cache import cache_folder, keep
from deploy.host.cpu import physical_core_cpus

MOST_CORES = 8
"""So many of the cores, at even distances, are measured."""
TRIPS = 1000
"""Handoffs there and back of each pair of cores."""
LOOPS = 100
STEPS = 1000
"""Loops on each core, and the steps of each of them."""
LIMIT_S = 1.0
"""Seconds to wait for a measurement, which takes 2 ms a core, and more where other programs run on it."""

APART = 1.6
"""Cores are farther apart from so many times the time of a handoff on."""
SLOW = 1.4
"""Cores are slower from so many times the time of a step on: the other half of a core costs 1.6 times, a clock that sinks less."""

KEPT_S = 86400
"""Seconds for which the best is kept: a virtual machine may move to another host."""

_PROGRAM = """
import json, mmap, os, sys, time
TRIPS, LOOPS, STEPS, SPINS = {trips}, {loops}, {steps}, 2_000_000
shared = mmap.mmap(-1, 4096)

def step(cpu):
    os.sched_setaffinity(0, [cpu])
    times = []
    for _ in range(LOOPS):
        start = time.perf_counter_ns()
        for _ in range(STEPS):
            pass
        times.append(time.perf_counter_ns() - start)
    return sorted(times)[LOOPS // 2] / STEPS

def wait(place, value):
    for _ in range(SPINS):
        if shared[place] == value:
            return
    os._exit(1)

def answer(cpu):
    os.sched_setaffinity(0, [cpu])
    for trip in range(TRIPS):
        wait(0, trip % 2 + 1)
        shared[64] = trip % 2 + 1
    os._exit(0)

def handoff(here, there):
    shared[0] = shared[64] = 0
    partner = os.fork()
    if not partner:
        answer(there)
    os.sched_setaffinity(0, [here])
    times = []
    for trip in range(TRIPS):
        start = time.perf_counter_ns()
        shared[0] = trip % 2 + 1
        wait(64, trip % 2 + 1)
        times.append(time.perf_counter_ns() - start)
    os.waitpid(partner, 0)
    return sorted(times)[TRIPS // 2] / 2

cpus = [int(cpu) for cpu in sys.argv[1:]]
for _ in sys.stdin:
    print(json.dumps([max(map(step, cpus)), max(map(handoff, cpus, cpus[1:]), default=None)]), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class CoreState:
    """What the cores were like at one moment.

    step_ns: nanoseconds that the interpreter took for one step of an empty loop, on the slowest core. handoff_us: microseconds from a
    write on one core to its sight on the next one, of the two that were farthest apart, 0.1 us of the interpreter included; None with one core.
    Both are medians of many.
    """

    step_ns: float
    handoff_us: float | None

    def is_below(self, best: "CoreState", threads: int) -> bool:
        """Whether the cores are slower than at their `best`, or too far apart for more than one thread."""
        known = self.handoff_us is not None and best.handoff_us is not None
        apart = known and (self.handoff_us or 0.0) > APART * (best.handoff_us or 0.0)
        return self.step_ns > SLOW * best.step_ns or (threads > 1 and apart)


def best_of(states: Iterable[CoreState]) -> CoreState | None:
    """The least of each figure; None if there is no state."""
    states = list(states)
    handoffs = [state.handoff_us for state in states if state.handoff_us is not None]
    if not states:
        return None
    return CoreState(step_ns=min(state.step_ns for state in states), handoff_us=min(handoffs, default=None))


def best_known() -> CoreState | None:
    """The best that these cores have been, as far as anybody measured, with this interpreter, since the machine was started and for a day."""
    try:
        kept = json.loads(_file().read_bytes())
        if kept["of"] == _cores() and 0 <= time.time() - kept["since"] < KEPT_S:
            return CoreState(**kept["best"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # there is none, or it is damaged
    return None


def remember(state: CoreState) -> None:
    """Keep this state if it is better than the best that is known."""
    known = best_known()
    best = best_of([state] if known is None else [state, known])
    if best is None or best == known:
        return
    since = time.time() if known is None else json.loads(_file().read_bytes())["since"]
    keep(_file(), json.dumps({"of": _cores(), "since": since, "best": asdict(best)}).encode(), "what the cores can do")


def _file() -> Path:
    return cache_folder() / "cores.json"


def _cores() -> list[str]:
    """What a best is of."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        started = ""
    return [started, sys.version, ",".join(map(str, sorted(os.sched_getaffinity(0))))]


class CoreProbe:
    """Measures the cores that this process may use in a small process of its own, which sleeps between two measurements."""

    def __init__(self) -> None:
        cpus = physical_core_cpus()
        program = _PROGRAM.format(trips=TRIPS, loops=LOOPS, steps=STEPS)
        command = [sys.executable, "-I", "-S", "-c", program, *map(str, cpus[:: max(1, len(cpus) // MOST_CORES)][:MOST_CORES])]
        self._process: subprocess.Popen[str] | None = None
        with contextlib.suppress(OSError):  # no interpreter can be started here
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is ours
            )

    def measure(self) -> CoreState | None:
        """What the cores are like now; None where a process may not choose its core."""
        if self._process is None:
            return None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            if select.select([self._process.stdout], [], [], LIMIT_S)[0] and (line := self._process.stdout.readline()):
                step_ns, handoff_ns = json.loads(line)
                return CoreState(step_ns=step_ns, handoff_us=None if handoff_ns is None else handoff_ns / 1e3)
        except OSError:
            pass  # it has ended
        self.close()
        return None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
