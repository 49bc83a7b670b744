"""What the activations of an FP32 graph look like on data: a histogram of every tensor that is to be quantized."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import numpy as np
import onnx

from deploy.artifact.tensors import Feed
from deploy.calibration.histogram import Histogram, NonFiniteError
from deploy.errors import PrecisionError
from deploy.precision.cpu import STREAMS, CpuGraph
from deploy.precision.int8.rewrite import LARGEST
from deploy.precision.ranges import activation_ranges


class Activations:
    """A prepared FP32 graph that is run on the CPU and gives some of its inner tensors beside its outputs."""

    def __init__(self, model: onnx.ModelProto, tensors: Sequence[str]) -> None:
        inputs = {value.name for value in model.graph.input}
        self.model = model
        self.tensors = tuple(tensors)
        self._outputs = [value.name for value in model.graph.output]
        inner = [name for name in tensors if name not in inputs and name not in self._outputs]
        self._run = CpuGraph(model, also=inner, streams=STREAMS)

    def __call__(self, feed: Feed) -> tuple[Feed, Feed]:
        """The tensors and the outputs by name. Raises PrecisionError when the feed cannot be run."""
        found = self._run(feed)
        return (
            {name: feed[name] if name in feed else found[name] for name in self.tensors},
            {name: found[name] for name in self._outputs},
        )


def collect(
    activations: Activations,
    feeds: Iterable[Feed],
    seen: Callable[[Feed, Feed, Feed], None] | None = None,
) -> dict[str, Histogram]:
    """Histograms of the magnitudes of all tensors over all feeds.

    They depend neither on the order of the feeds, of which STREAMS are run at a time, nor on how the data is cut into
    feeds, and memory does not grow with their number. `seen` is given each feed, its tensors and its outputs, in any order
    and in threads of their own. Raises PrecisionError when a feed cannot be run, and, naming the node, when it makes NaN
    or infinity.
    """
    histograms = {name: (Histogram(), Lock()) for name in activations.tensors}

    def count(feed: Feed) -> None:
        found, outputs = activations(feed)
        for name, (histogram, lock) in histograms.items():
            try:
                with lock:
                    histogram.add(found[name])
            except NonFiniteError as error:
                raise PrecisionError(_not_finite(activations.model, name, feed, error)) from error
        if seen is not None:
            seen(feed, found, outputs)

    running: deque[Future[None]] = deque()
    with ThreadPoolExecutor(STREAMS, thread_name_prefix="calibration") as pool:
        for feed in feeds:
            running.append(pool.submit(count, feed))
            if len(running) > STREAMS:  # one feed waits for a thread, and no more, for they take memory
                running.popleft().result()
        while running:
            running.popleft().result()
    return {name: histogram for name, (histogram, _) in histograms.items()}


def scale_of(amax: float) -> float:
    """The scale, a float32 number, at which `amax` is the largest number that INT8 holds: amax / 127, TensorRT's rule.

    1 for a tensor that was 0 throughout: any scale represents it.
    """
    scale = float(np.float32(amax / LARGEST))
    return max(scale, float(np.finfo(np.float32).tiny)) if amax > 0 else 1.0


def _not_finite(model: onnx.ModelProto, tensor: str, feed: Feed, error: NonFiniteError) -> str:
    """Which node makes NaN or infinity first, of finite inputs."""
    if tensor in feed:
        return f"the calibration data for input {tensor!r} is not finite: {error}"
    ranges = activation_ranges(model, [feed])
    node = next(node for node in model.graph.node for name in node.output if name in ranges and not ranges[name].finite)
    return (
        f"node {node.name!r} ({node.op_type}) makes numbers that are not finite on the calibration data ({error}); check the"
        " weights, and that the preprocessing is what the model was trained with"
    )
