"""Ranges of NVTX, which Nsight Systems shows beside the work of the GPU."""

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

from deploy.errors import BackendError

Annotate = Callable[[str], AbstractContextManager[Any]]


def annotations() -> Annotate:
    """Makes a range from its name: through torch if the program has imported it, else through the package nvtx.

    Raises BackendError if there is neither.
    """
    if (torch := sys.modules.get("torch")) is not None:
        return cast(Annotate, torch.cuda.nvtx.range)
    try:
        return cast(Annotate, importlib.import_module("nvtx").annotate)
    except ImportError as error:
        raise BackendError("the variant nvtx needs torch, imported, or the package nvtx: pip install nvtx") from error
