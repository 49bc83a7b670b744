"""What a fault is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.simulator.artifacts import model
from tests.simulator.plans import make_plan
from tests.simulator.rules.probe import Here
from tests.simulator.simulated import Simulated


class Fault(NamedTuple):
    """says: a part of the error."""

    says: str
    run: Callable[[Fixture], None]


FAULTS: dict[str, Fault] = {}


def fault(says: str) -> Callable[[Callable[[Fixture], None]], Callable[[Fixture], None]]:
    def add(function: Callable[[Fixture], None]) -> Callable[[Fixture], None]:
        FAULTS[function.__name__] = Fault(says, function)
        return function

    return add


class Fixture(Here):
    """`Here` on the simulator, with an engine `y = 2 x` whose buffers are for 8 rows."""

    def __init__(self, simulated: Simulated) -> None:
        super().__init__(simulated.runtime, torch, simulated.trt, make_plan)
        self.simulated = simulated
        self.x, self.y = self.memory(0, 512), self.memory(0, 512)

    def engine(self, outputs: tuple[str, ...] = ("y",), flavour: str = "tensorrt", *, stripped: bool = False) -> Any:
        front = self.simulated.trt if flavour == "tensorrt" else self.simulated.rtx
        ranges = [{"x": ((1, 4), (2, 4), (high, 4))} for high in (4, 8)]
        return front.Runtime(front.Logger()).deserialize_cuda_engine(
            make_plan(model(outputs), ranges, flavour=flavour, stripped=stripped)
        )

    def context(self, rows: int = 2, engine: Any = None) -> Any:
        context = (engine or self.engine()).create_execution_context()
        context.set_input_shape("x", (rows, 4))
        context.set_tensor_address("x", self.x)
        context.set_tensor_address("y", self.y)
        return context

    def graph(self, context: Any, stream: int) -> Any:
        """A captured run, after a plain one."""
        assert context.execute_async_v3(stream)
        self.begin(stream)
        assert context.execute_async_v3(stream)
        return self.end(stream)
