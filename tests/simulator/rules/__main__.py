"""Probes on the real libraries.

`python -m tests.simulator.rules NAME` runs one, and ends with status 1 where the rule does not hold. Without NAME, or with the name
of a library (runtime, torch, tensorrt), it runs all of them, each in a process of its own, and prints a line for each. It needs
nothing but numpy and that library.
"""

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.simulator.rules import collect
from tests.simulator.rules.probe import Here, Probe

AT_ONCE = 8
LIMIT_S = 60


def run(probe: Probe) -> None:
    def library(name: str, module: str) -> Any:
        return importlib.import_module(module) if probe.library == name else None

    runtime = importlib.import_module("cuda.bindings.runtime")
    probe.run(Here(runtime, library("torch", "torch"), library("tensorrt", "tensorrt")))


def report(probe: Probe) -> bool:
    """Whether the rule holds; prints a line."""
    try:
        command = [sys.executable, "-m", "tests.simulator.rules", probe.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        status, last = done.returncode, (done.stderr.strip().splitlines() or [""])[-1]
        where = [line.strip() for line in done.stderr.splitlines() if "/rules/" in line][-1:]
    except subprocess.TimeoutExpired:
        status, last, where = 1, f"not done after {LIMIT_S} s", []
    sys.stdout.write(f"{'holds' if status == 0 else 'FAILS'}  {probe.name}  {'' if status == 0 else f'{last} {where}'}\n")
    sys.stdout.flush()
    return status == 0


def main() -> None:
    probes = collect()
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in probes:
        run(probes[name])
        os._exit(0)  # a GPU that a probe has broken may end the process while it is taken down
    chosen = [probe for probe in probes.values() if name in (None, probe.library)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        held = sum(pool.map(report, chosen))
    sys.stdout.write(f"{held} of {len(chosen)} hold\n")
    sys.exit(held != len(chosen))


if __name__ == "__main__":
    main()
