"""Programs that break one rule each, and what the simulator says of them."""

import importlib

from tests.simulator.faults.fault import FAULTS, Fault

FILES = ("memory", "graphs", "engines", "tensors")


def collect() -> dict[str, Fault]:
    """All faults by name."""
    for name in FILES:
        importlib.import_module(f"tests.simulator.faults.{name}")
    return FAULTS
