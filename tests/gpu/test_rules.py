"""The rules that the simulator of the tests keeps are those of a real GPU: the same probes, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulator.rules import collect

ROOT = Path(__file__).parents[2]
PROBES = collect()


@pytest.mark.parametrize("name", PROBES)
def test_the_rule_holds(name: str) -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    if PROBES[name].library == "tensorrt":
        pytest.importorskip("tensorrt", reason="tensorrt is not installed")
    command = [sys.executable, "-m", "tests.simulator.rules", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{PROBES[name].source}\n{done.stderr}"
