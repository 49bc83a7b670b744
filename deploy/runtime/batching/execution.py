"""One batch under way, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.errors import BackendError, DeployError
from deploy.runtime.batching.queue import Outputs, Request


@dataclass(frozen=True, kw_only=True)
class _Done:
    """A batch that was run: its outputs or the error, when it was begun, put together and run, and whether in the caller's thread."""

    batch: Sequence[Request]
    here: bool
    outputs: Outputs | None
    error: Exception | None
    began: float
    joined: float
    ran: float


def _ours(error: Exception, name: str) -> Exception:
    if isinstance(error, DeployError):
        return error
    wrapped = BackendError(f"running {name!r} failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
