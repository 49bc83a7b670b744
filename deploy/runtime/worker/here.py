"""A worker without a process of its own, for sessions on a GPU.

On a processor, the thread pools of two sessions in one process disturb one another. On a GPU they do not, and every process more takes
a CUDA context of its own: memory, and time at every change from one to the other.
"""

import os
from typing import Any

from deploy.artifact.artifact import Artifact
from deploy.runtime.session import SessionOptions
from deploy.runtime.worker.child import Worker
from deploy.runtime.worker.process import WorkerProcess


class WorkerHere(WorkerProcess):
    """What a `WorkerProcess` does, in this process. Requests raise the errors of the session, at once."""

    def __init__(self, artifact: Artifact, backend: str, options: SessionOptions) -> None:
        self.label = f"{artifact.shown} on {backend}"
        self.threads = 1  # the one that launches
        self._backend, self._options = backend, options
        self._worker = Worker(own_process=False)
        self._reply: dict[str, Any] = {}
        self.reopen(artifact)

    @property
    def pid(self) -> int:
        return os.getpid()

    def _send(self, request: dict[str, Any]) -> None:
        self._reply = self._worker.handle(request)

    def _receive(self) -> dict[str, Any]:
        return self._reply

    def close(self) -> None:
        """Close the session."""
        self._worker.close()
