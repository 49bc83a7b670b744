"""`Session.stream` on every backend that runs here, closed while its iterator is half read. Engines: `backends/test_tensorrt_stream.py`."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from deploy.artifact.artifact import Artifact
from deploy.errors import SessionClosedError
from deploy.runtime.catalog import BACKENDS
from deploy.runtime.load import open_session
from deploy.runtime.session import Session

WAIT_S = 20.0
FEEDS = 6


def feeds() -> Iterator[dict[str, np.ndarray]]:
    return ({"input": np.full((2, 1, 28, 28), index, np.float32)} for index in range(FEEDS))


def close_here(session: Session) -> None:
    session.close()


def close_elsewhere(session: Session) -> None:
    thread = threading.Thread(target=session.close, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "close() hangs"


CASES = [
    (name, read)
    for name, backend in BACKENDS.items()
    if backend.runs != "engine"
    for read in ((1,) if name == "compile" else (0, 1, 2))  # which takes seconds to compile
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("close", [close_here, close_elsewhere])
@pytest.mark.parametrize(("backend", "read"), CASES)
def test_an_iterator_that_is_half_read_keeps_no_session_open(
    shared_lenet5: Artifact, package: Artifact, backend: str, read: int, close: Callable[[Session], None]
) -> None:
    session = open_session(package if backend == "aoti" else shared_lenet5, backend)
    outputs = session.stream(feeds())
    for _ in range(read):
        assert next(outputs)["logits"].shape == (2, 10)
    close(session)
    with pytest.raises(SessionClosedError, match="the session on 'lenet5' is closed"):
        next(outputs)
    assert list(outputs) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("deploy lenet5")]


def test_a_thread_that_waits_for_an_output_is_told_of_the_close(shared_lenet5: Artifact) -> None:
    session = open_session(shared_lenet5, "null")
    begun, go_on = threading.Event(), threading.Event()
    compute = session._compute

    def slow(feed: dict[str, np.ndarray]) -> object:
        begun.set()
        assert go_on.wait(WAIT_S)
        return compute(feed)

    session._compute = slow  # type: ignore[method-assign, assignment]
    ended: list[object] = []

    def read() -> None:
        try:
            ended.extend(session.stream(feeds()))
        except SessionClosedError as error:
            ended.append(error)

    reader = threading.Thread(target=read, daemon=True)
    closer = threading.Thread(target=session.close, daemon=True)
    reader.start()
    assert begun.wait(WAIT_S)
    closer.start()
    while not session._closed:
        pass
    go_on.set()
    for thread in (reader, closer):
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert isinstance(ended[-1], SessionClosedError)
    assert len(ended) <= 2  # the run that was under way, at most
