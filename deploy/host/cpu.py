"""The processor: its name, how much of it this process may use, and what must not run on it."""

import functools
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from deploy.host.cpu_limit import cpu_limit

T = TypeVar("T")

CRASHES_ON_HALF = "MatmulTransposeFusion"
"""The optimizer of ONNX Runtime that puts a Transpose into the MatMul behind it. Where the batch is moved too and the numbers are
FP16, as in every attention of PyTorch, it ends the process with a segmentation fault on the CPU (seen with 1.32). Convolutions do not
need it."""

DROPS_RELU = "ReluQuantRewrite"
"""The optimizer of ONNX Runtime that leaves out a Relu before a QuantizeLinear whose codes have no negative ones: those of FP8 have, and
it leaves it out all the same, so that the results are wrong (seen with 1.32)."""

QUANTIZES_WEIGHTS = "WeightBiasQuantization"
"""The optimizer of ONNX Runtime that quantizes the weight of a layer between a DequantizeLinear and a QuantizeLinear: those that were
left in floating point on purpose too."""

_IN_32_BITS = "session.x64quantprecision"
_SHARED_ZERO = "Attempt to replace the existing tensor"

_VNNI = frozenset(("avx512_vnni", "avx_vnni"))


def cpu_model() -> str:
    """The name of the processor, as the kernel reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


_COMPILED = re.compile(
    r"sse|ssse|avx|amx|fma|f16c$|bmi|popcnt$|abm$|movbe$|asimd|sve|sme\d*$|bf16$|i8mm$|fp(hp)?$|atomics$|dotprod|neon$"
)
"""The instruction sets that a compiler makes use of by itself, as the kernel calls them on x86 and Arm. The other flags of a processor
say what an operating system can do with it."""


def instruction_sets() -> list[str]:
    """The instruction sets of the processor that compiled code may hold, such as `avx2`, in order; none where the kernel reports none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted({flag for flag in flags if _COMPILED.match(flag)})


@functools.cache
def has_vnni() -> bool:
    """Whether the processor multiplies unsigned by signed bytes and adds up in 32 bits (VNNI of x86), as the kernel reports it.

    Without, such products are added in 16 bits first, where they overflow.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not _VNNI.isdisjoint(flags)


def is_x86() -> bool:
    """Whether the processor multiplies unsigned by signed bytes; others multiply signed ones."""
    return platform.machine() in ("x86_64", "AMD64")


def adds_in_16_bits() -> bool:
    """Whether products of unsigned and signed bytes overflow: see `has_vnni`."""
    return is_x86() and not has_vnni()


def open_in_32_bits(settings: Any, open_session: Callable[[], T]) -> T:
    """What `open_session` returns, which opens an InferenceSession with these SessionOptions.

    Where products of bytes overflow in 16 bits, ONNX Runtime is told to make weights unsigned, which are added up in 32. It cannot load a file in
    which weights share the initializer of a zero point then (seen with 1.32; those of `deploy quantize` do not): such a file is opened without.
    """
    settings.add_session_config_entry(_IN_32_BITS, "1")  # of no effect on other processors
    try:
        return open_session()
    except Exception as error:  # ONNX Runtime's errors have no common base
        if _SHARED_ZERO not in str(error):
            raise
        settings.add_session_config_entry(_IN_32_BITS, "0")
        return open_session()


def usable_cores() -> int:
    """The number of physical cores that this process may use, or fewer if a control group allows less time, rounded down; at least 1.

    This is the default number of threads. ONNX Runtime's default is the number of cores of the whole machine: a container
    that may use two of 64 cores would run 64 threads. Rounded down, because threads that use up the time of a period all stop
    until the next one.
    """
    cores, limit = physical_cores(), cpu_limit()
    return cores if limit is None else max(1, min(cores, int(limit)))


def physical_cores() -> int:
    """The number of physical cores that this process may run on."""
    return len(physical_core_cpus())


def physical_core_cpus() -> list[int]:
    """One logical CPU of each physical core that this process may run on, in order."""
    first: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        first.setdefault(_siblings(cpu), cpu)
    return list(first.values())


def _siblings(cpu: int) -> str:
    """The logical CPUs that share a core with `cpu`; only `cpu` if the kernel does not report them."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def cache_bytes() -> int | None:
    """The size in bytes of the largest cache of the processor; None if the kernel does not report it."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * scale)
    return max(sizes, default=None)


def governor() -> str | None:
    """The kernel's policy for the clock rate, such as `performance`; None if unknown, as in most virtual machines."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
    except OSError:
        return None
