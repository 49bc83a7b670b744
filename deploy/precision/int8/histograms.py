"""Histograms of the activations of an FP32 graph on data, one for every tensor that is to be quantized."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import onnx_ir as ir

from deploy.artifact.tensors import Feed
from deploy.calibration.histogram import Histogram, NonFiniteError
from deploy.errors import PrecisionError
from deploy.host.memory import trim
from deploy.precision.cpu import STREAMS, CpuGraph
from deploy.precision.int8.branches import branched_nodes, with_outputs
from deploy.precision.ranges import activation_ranges

_TRIMMED = 32
"""After so many feeds, free blocks are given back: else they become more with the number of feeds, as the C library splits them."""


class Activations:
    """A prepared FP32 model that runs on the CPU and returns some of its inner tensors in addition to its outputs.

    A tensor in a branch of an If is left out where the other branch ran.
    """

    def __init__(self, model: ir.Model, tensors: Sequence[str]) -> None:
        inputs = {value.name for value in model.graph.inputs}
        self.model = model
        self.tensors = tuple(tensors)
        self._outputs = [value.name or "" for value in model.graph.outputs]
        inner = [name for name in tensors if name not in inputs and name not in self._outputs]
        extended, self._shown = with_outputs(model, inner)
        self._run = CpuGraph(extended, also=[self._shown.get(name, name) for name in inner], streams=STREAMS)

    def __call__(self, feed: Feed) -> tuple[Feed, Feed]:
        """The tensors and the outputs by name. Raises PrecisionError when the feed cannot be run."""
        results = self._run(feed)
        absent = {name for name, shown in self._shown.items() if not results[shown].size}
        found = {name: feed[name] if name in feed else results[self._shown.get(name, name)] for name in self.tensors}
        return (
            {name: array for name, array in found.items() if name not in absent},
            {name: results[name] for name in self._outputs},
        )


def collect(
    activations: Activations,
    feeds: Iterable[Feed],
    seen: Callable[[Feed, Feed, Feed], None] | None = None,
) -> dict[str, Histogram]:
    """Histograms of the magnitudes of all tensors over all feeds.

    They depend neither on the order of the feeds, STREAMS of which run concurrently, nor on how the data is divided into
    feeds, and memory does not grow with their number. `seen` is called with every feed, its tensors and its outputs, in any
    order and from several threads. Raises PrecisionError when a feed cannot be run, and, naming the node, when a node
    makes NaN or infinity.
    """
    histograms = {name: (Histogram(), Lock()) for name in activations.tensors}

    def count(feed: Feed) -> None:
        tensors, outputs = activations(feed)
        for name in tensors:
            histogram, lock = histograms[name]
            try:
                with lock:
                    histogram.add(tensors[name])
            except NonFiniteError as error:
                raise PrecisionError(_not_finite(activations.model, name, feed, error)) from error
        if seen is not None:
            seen(feed, tensors, outputs)

    running: deque[Future[None]] = deque()
    with ThreadPoolExecutor(STREAMS, thread_name_prefix="calibration") as pool:
        for index, feed in enumerate(feeds):
            if index % _TRIMMED == 0:
                trim()
            running.append(pool.submit(count, feed))
            if len(running) > STREAMS:  # at most one feed waits for a thread, because feeds take memory
                running.popleft().result()
        while running:
            running.popleft().result()
    trim()
    return {name: histogram for name, (histogram, _) in histograms.items()}


def _not_finite(model: ir.Model, tensor: str, feed: Feed, error: NonFiniteError) -> str:
    """The message of the error, with the first node that makes NaN or infinity from finite inputs."""
    if tensor in feed:
        return f"the calibration data for input {tensor!r} is not finite: {error}"
    ranges = activation_ranges(model, [feed])
    broken = {name for name, seen in ranges.items() if not seen.finite} | {tensor}
    node = next(node for node in branched_nodes(model.graph) for value in node.outputs if value.name in broken)
    return (
        f"node {node.name!r} ({node.op_type}) makes numbers that are not finite on the calibration data ({error}); check the"
        " weights, and that the preprocessing is what the model was trained with"
    )
