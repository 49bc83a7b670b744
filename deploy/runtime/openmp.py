"""The threads of OpenMP, which torch computes with on the CPU, across a fork.

In GNU's libgomp each thread that has computed keeps a team of threads for the next time. A child has the team of the thread that
forked, but not its threads: it would wait for them for ever. So that team is given up before a fork (omp_pause_resource_all, OpenMP
5.0, section 3.2.44); parent and child make a new one when they need it.
"""

import ctypes
import os
from pathlib import Path

from deploy.errors import BackendError

_HARD = 2  # omp_pause_hard of omp.h

_prepared = False


def _libraries() -> set[str]:
    """The files of libgomp in this process: torch brings one along."""
    mapped = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())
    return {words[5] for words in mapped if "libgomp" in words[-1]}


def _before_fork() -> None:
    global _prepared
    _prepared = not any(ctypes.CDLL(file).omp_pause_resource_all(_HARD) for file in _libraries())


def _after_fork_in_parent() -> None:
    global _prepared
    _prepared = False


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)


def refuse_lost_threads(name: str) -> None:
    """Called in a forked child, of a model called `name`. Raises BackendError if its threads were not given up before the fork."""
    if not _prepared:
        raise BackendError(
            f"{name!r} was loaded before the process was forked, not by Python's os.fork: the threads of OpenMP did not survive."
            " Call deploy.load() in the child (uWSGI: lazy-apps)"
        )
