"""Run one probe on the real libraries: `python -m tests.simulator.rules NAME`. It ends with status 1 where the rule does not hold."""

import importlib
import sys
from typing import Any

from tests.simulator.rules import collect
from tests.simulator.rules.probe import Here


def main() -> None:
    probe = collect()[sys.argv[1]]

    def library(name: str, module: str) -> Any:
        return importlib.import_module(module) if probe.library == name else None

    runtime = importlib.import_module("cuda.bindings.runtime")
    probe.run(Here(runtime, library("torch", "torch"), library("tensorrt", "tensorrt")))


if __name__ == "__main__":
    main()
