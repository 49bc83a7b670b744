"""Rules of CUDA, torch and TensorRT, one probe each, which runs on the simulator and on a real GPU alike.

`python -m tests.simulator.rules NAME` runs one on the real libraries.
"""

import importlib

from tests.simulator.rules.probe import PROBES, Probe

FILES = ("streams", "memory", "captures", "torch_rules", "tensorrt_rules")


def collect() -> dict[str, Probe]:
    """All probes by name."""
    for name in FILES:
        importlib.import_module(f"tests.simulator.rules.{name}")
    return PROBES
