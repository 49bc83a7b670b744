"""The module through `torch.compile`. Slow to start: it compiles at the first run of a shape."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from deploy.artifact import Artifact
from deploy.errors import BackendError
from deploy.runtime.session import Session, SessionOptions

try:
    import torch

    from deploy.runtime.eager import EagerSession
except ImportError as error:
    raise BackendError(f"torch cannot be imported ({error}); install it with: pip install torch") from error

# The compiler looks for a CUDA toolkit wherever it runs, and complains of one that has no GPU, while it compiles for the CPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.getMessage())


class CompileSession(EagerSession):
    backend = "compile"

    def _prepare(self, module: torch.nn.Module) -> Any:
        self._lock = threading.Lock()
        self._compiled: set[tuple[torch.Size, ...]] = set()
        # With fullgraph, what cannot be compiled is an error; without, it would run as eager in silence.
        return torch.compile(module, fullgraph=True)

    def _call(self, module: Any, inputs: Sequence[torch.Tensor]) -> Any:
        shapes = tuple(x.shape for x in inputs)
        if shapes in self._compiled:
            return module(*inputs)
        with self._lock:  # threads that meet a new shape together compile it once
            result = module(*inputs)
            self._compiled.add(shapes)
        return result


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return CompileSession(artifact, options)
