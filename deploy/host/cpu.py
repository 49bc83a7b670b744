"""The processor: its name, and how much of it this process may use."""

import os
import platform
from pathlib import Path


def cpu_model() -> str:
    """Name of the processor, as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Physical cores that this process may use, less where a control group allows less time.

    It is the number of threads where none is asked for: ONNX Runtime's own choice, for one, counts the cores of the whole
    machine, and a container that may use two of 64 cores then has 64 threads.
    """
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota(len(cpus))))


def _siblings(cpu: int) -> str:
    """The logical CPUs that share a core with `cpu`; itself where the kernel does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota(default: int) -> int:
    """CPUs' worth of time that the control group (version 2) allows; `default` where there is no limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return default
    return default if limit == "max" else -(-int(limit) // int(period))


def cache_bytes() -> int | None:
    """Size of the largest cache of the processor; None where the kernel does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * scale)
    return max(sizes, default=None)


def governor() -> str | None:
    """How the kernel sets the clock rate (`performance`, `schedutil`); None where it does not say, as in most virtual machines."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
    except OSError:
        return None
