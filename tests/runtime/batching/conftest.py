"""A session that tests can hold in the middle of a run."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.runtime.load import open_session
from deploy.runtime.session import Session

WAIT_S = 20


class Gated:
    """A session that can be held, and notes the rows of each run. A feed whose first pixel is 666 breaks the run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Semaphore(0)
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, feed: dict[str, np.ndarray]) -> Any:
        x = next(iter(feed.values()))
        self.rows.append(len(x))
        self.inside.release()
        assert self.gate.wait(WAIT_S)
        if (x[:, 0, 0, 0] == 666).any():
            raise RuntimeError("a cosmic ray")
        return self._session.run(feed)


@pytest.fixture
def session(shared_lenet5: Artifact) -> Iterator[Any]:
    with open_session(shared_lenet5, "onnxruntime") as session:
        yield Gated(session)
