"""Refitter and OnnxParserRefitter: an engine that was built without its weights gets those of an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorrt_rtx

from tests.simulator.errors import RuleError
from tests.simulator.tensorrt_front import Engine


class Refitter:
    """Refitter. A null pointer, which it is for an engine that takes no weights, is a TypeError of the bindings."""

    def __init__(self, engine: Engine, logger: Any) -> None:
        if not engine.plan.stripped:
            logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "the engine is not refittable")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._engine = engine
        self._model: bytes | None = None

    def get_missing_weights(self) -> list[str]:
        return ["two"] if self._model is None else []

    def refit_cuda_engine(self) -> bool:
        engine = self._engine
        with engine.machine.inside("refit_cuda_engine"):
            if engine.machine.here.device != engine.device:
                raise RuleError(f"an engine of cuda:{engine.device} is refitted while another GPU is current")
            if engine.contexts:
                raise RuleError("an engine is refitted that has contexts, which compute with what was there")
            if self._model is None:
                return False
            engine.plan.refit(self._model)
            return True


class OnnxParserRefitter:
    """OnnxParserRefitter."""

    num_errors = 0

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        self._refitter._model = Path(model).read_bytes()
        return True
