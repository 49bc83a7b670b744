"""The CUDA graph of one execution context: when it is captured, replayed and dropped."""

import logging
from collections.abc import Callable, Hashable

from deploy.engine.cuda import Device, Graph, Stream
from deploy.engine.log import garbage_kept
from deploy.errors import BackendError

logger = logging.getLogger("deploy.runtime")

WORTH = 32
"""Replays that make up for the capture of a graph, which takes as long as several runs."""


class Replay:
    """Runs work on a stream, by a graph where that is possible.

    A graph replays the shapes, addresses and state of the context that it was captured with: `drop` it before any of them
    changes. It is captured right after a plain run of the same work, as TensorRT requires ("Advanced Topics", "CUDA Graphs", of
    its documentation). Where graphs are dropped before they paid, later ones wait for more plain runs in a row.

    wanted: whether to capture at all; may be changed between runs.
    """

    def __init__(self, device: Device, stream: Stream, *, wanted: bool) -> None:
        self.wanted = wanted
        self._device = device
        self._stream = stream
        self._graph: Graph | None = None
        self._replays = 0
        self._plain = 0  # runs without a graph since the last drop
        self._patience = 1  # that many before a capture
        self._refused: set[Hashable] = set()

    def drop(self) -> None:
        if self._graph is not None:
            self._patience = 1 if self._replays >= WORTH else min(2 * self._patience, WORTH)
        self._graph = None
        self._plain = self._replays = 0

    def run(self, launch: Callable[[], None], bound: Hashable, shown: Callable[[], str]) -> None:
        """Queue the work that `launch` does, without waiting for anything, on the stream.

        bound: what identifies the work; a capture that failed is not tried again for the same. shown: what a warning calls it.
        """
        if self._graph is None and self.wanted and self._plain >= self._patience and bound not in self._refused:
            try:
                with garbage_kept():  # whose release would be captured as well
                    self._graph = self._device.capture(launch, self._stream)
            except BackendError as error:
                logger.warning("no CUDA graph for %s: %s; it runs without", shown(), str(error))
                self._refused.add(bound)
        if self._graph is not None:
            self._graph.launch(self._stream)
            self._replays += 1
            return
        launch()
        self._plain += 1
