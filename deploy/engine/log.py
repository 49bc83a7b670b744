"""TensorRT's messages: errors are kept, for they say why a call returned nothing, and warnings passed on."""

import logging
from typing import Any

from deploy.engine.bindings import Bindings

logger = logging.getLogger("deploy.engine")


def make_logger(trt: Bindings) -> Any:
    """An ILogger of the flavour whose module is `trt`; `last()` is the last error that it was told."""

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())
            elif severity == trt.ILogger.WARNING:
                logger.info("%s", message.strip())

        def last(self) -> str:
            return self.errors[-1] if self.errors else "no reason was given"

    return Log()
