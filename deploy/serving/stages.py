"""When the stages of a request began and ended, for what traces them."""

import time
from collections.abc import Callable, Mapping

from deploy.runtime.batching.queue import RequestTimes


class Stages:
    """The times of one request, in seconds on the performance counter; None for what was not reached.

    began, decoded: when its tensors began to be read, and when they were there. ran: of its batch.
    """

    __slots__ = ("began", "decoded", "model", "ran", "request_id", "version")

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.decoded: float | None = None
        self.ran: RequestTimes | None = None
        self.model = self.version = self.request_id = ""

    def set_ran(self, times: RequestTimes) -> None:
        self.ran = times


Trace = Callable[[Mapping[str, str], Stages, BaseException | None], None]
"""Called at the end of an inference request with its headers (or gRPC's metadata), its stages, and the error if it failed."""
