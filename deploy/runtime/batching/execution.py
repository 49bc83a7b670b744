"""The run of one batch: joined, run, and taken apart into the answers of its requests."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from deploy.errors import BackendError, DeployError
from deploy.runtime.batching.queue import Joiner, Outputs, Request, RequestTimes, apart
from deploy.runtime.session import Session


class Done(NamedTuple):
    """A batch after its run: its outputs or the error, and when it began, was joined and had run (on the performance counter).

    here: it ran in the caller's thread.
    """

    batch: Sequence[Request]
    here: bool
    outputs: Outputs | None
    error: Exception | None
    began: float
    joined: float
    ran: float


def execute(session: Session, batch: Sequence[Request], joiner: Joiner) -> list[Done]:
    """Run the batch; if that fails, run each request alone, because only one of them may be to blame."""
    done = run(session, batch, joiner)
    if done.error is None or len(batch) == 1:
        return [done]
    return [run(session, [request], joiner) for request in batch]


def run(session: Session, batch: Sequence[Request], joiner: Joiner | None) -> Done:
    """Run the batch once. joiner: None for a single request in the caller's thread."""
    began = joined = time.perf_counter()
    outputs: Outputs | None = None
    error: Exception | None = None
    try:
        feed = batch[0].feed if joiner is None or len(batch) == 1 else joiner.join(batch)
        joined = time.perf_counter()
        outputs = session.run(feed)
    except Exception as caught:
        error = caught
    ran = time.perf_counter()
    for request in batch:
        request.times = RequestTimes(came=request.came, began=began, ran=ran)
    return Done(batch=batch, here=joiner is None, outputs=outputs, error=error, began=began, joined=joined, ran=ran)


def hand_out(done: Done, name: str) -> Done:
    """Answer every request of the batch; `done` itself, with the error if the outputs could not be taken apart.

    name: what errors call the model.
    """
    error = done.error
    for request, answer in zip(done.batch, _answers(done), strict=True):
        if isinstance(answer, Exception):
            error = answer
            request.finish(None, ours(answer, name))
        else:
            request.finish(answer, None)
    return done._replace(error=error)


def _answers(done: Done) -> Sequence[Outputs | Exception]:
    """The answer to each request of the batch: its own rows, or the error."""
    batch, outputs = done.batch, done.outputs
    if outputs is None:
        assert done.error is not None
        return [done.error] * len(batch)
    if len(batch) == 1:
        return [outputs]
    try:
        return apart(outputs, [request.rows for request in batch])
    except Exception as error:  # no memory for them, or fewer rows than were fed: this answers all of them
        return [error] * len(batch)


def ours(error: Exception, name: str) -> Exception:
    """The error itself if it is one of deploy's, else a BackendError caused by it."""
    if isinstance(error, DeployError):
        return error
    wrapped = BackendError(f"running {name!r} failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
