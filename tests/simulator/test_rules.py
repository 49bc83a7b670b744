"""The simulator keeps the rules. The same probes run on a real GPU in `tests/gpu/test_rules.py`."""

import pytest
import torch

from tests.simulator.plans import make_plan
from tests.simulator.rules import collect
from tests.simulator.rules.probe import Here
from tests.simulator.simulated import Simulated

PROBES = collect()


@pytest.mark.parametrize("name", PROBES)
def test_the_simulator_keeps_the_rule(simulated: Simulated, name: str) -> None:
    here = Here(simulated.runtime, torch, simulated.trt, make_plan)
    PROBES[name].run(here)
    simulated.settle()
    assert simulated.machine.violations == here.found
    simulated.machine.violations.clear()
