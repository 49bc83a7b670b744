"""The error of every tensor of B against A's: as it runs, and fed A's own tensors, beside the noise floor of each."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploy.artifact.tensors import Feed
from deploy.precision.cpu import CpuGraph
from deploy.precision.ranges import Range, activation_ranges
from deploy.progress import Progress
from deploy.verify.floor import SEEDS, noisy
from deploy.verify.graphs import LOCAL, Graph, cut

BEYOND = 2.0
"""How many times the floor an error must be to count."""

CLEAN = 1.3
"""How many times the floor it is at most in layers without a fault."""

_PASS_BYTES = 256 << 20
"""Tensors held at a time; a graph is run in as many passes as that takes."""

_SIGMAS, _SIGMAS_OF_SLICES = 3.0, 5.0
_OF_SLICES = 3.0
"""How many times as far a slice may be beyond its floor as the whole: what the rounding of a channel's weights does to it is one
draw, the same at every position, and there are many channels."""
_SMALLEST = 2.0**-26
"""Of a slice's floor, against the whole tensor: below half a unit in the last place of FP32 nothing is said."""
_LEAST_OF_WHOLE = 0.5
"""Of a slice's floor, against that of the whole tensor: what is far below that is lost in the noise of the others."""

_UNKNOWN_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Error:
    """How far a tensor is off, and how far rounding may bring it.

    error: the root mean square of the difference, over that of A's tensor; of integers and booleans, the share that differs.
    floor: the same of A's own layers rounded at random in B's formats.
    times: by how many times the error is beyond the floor, in the channel, row or the whole where that is most.
    """

    error: float
    floor: float
    times: float

    @property
    def beyond(self) -> bool:
        return self.times > BEYOND


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One tensor that both artifacts compute.

    node, operator: what computes it in A. module, source: the module of the model and the line of its code, where the file says
    so. local: fed A's tensors. cumulative: as B runs. range: of A's tensor.
    """

    tensor: str
    node: str
    operator: str
    local: Error
    cumulative: Error
    range: Range | None
    source: str = ""

    @property
    def module(self) -> str:
        """`layer1.0.conv2` of the node `layer1.0.conv2/Conv`; "" where the name has no module."""
        return self.node.rpartition("/")[0]


class Comparison:
    """Runs two graphs on one feed, tensor by tensor, in passes of bounded memory.

    ranges: those of A's tensors on the feed, where they are known.
    """

    def __init__(
        self,
        a: Graph,
        b: Graph,
        pairs: Sequence[str],
        feed: Feed,
        progress: Progress,
        *,
        ranges: Mapping[str, Range] | None = None,
    ) -> None:
        self.a, self.b, self.pairs = a, b, tuple(pairs)
        self.feed = feed
        self._progress = progress
        self._held: dict[str, np.ndarray] = {}
        progress("reading ranges")
        self.ranges = activation_ranges(a.model, [feed]) if ranges is None else ranges
        amax = {name: found.amax for name, found in self.ranges.items()}
        self._noisy = [noisy(a, b, amax, seed) for seed in range(SEEDS)]
        self._sizes = {name: _bytes(value, feed) for name, value in a.values().items()}

    def layers(self) -> list[Layer]:
        """Every pair, in the order of B. Raises PrecisionError where a graph cannot be run."""
        found: list[Layer] = []
        for part in self._passes(self.pairs):
            self._progress("comparing layers", len(found), len(self.pairs))
            local, cumulative = self.local(part), self._cumulative(part)
            for name in part:
                maker = self.a.makers[name]
                found.append(
                    Layer(
                        tensor=name,
                        node=maker.name,
                        operator=maker.operator,
                        local=local[name],
                        cumulative=cumulative[name],
                        range=self.ranges.get(name),
                        source=maker.source,
                    )
                )
            self._held.clear()
        return found

    def local(self, targets: Collection[str], without: Collection[str] = ()) -> dict[str, Error]:
        """The errors of `targets`, each computed from A's tensors; those of `without` are not fed, but computed."""
        fed = [name for name in self.pairs if name not in without]
        graphs = [cut(model, targets, fed) for model in (self.b.model, *self._noisy)]
        given = self._exact({value.name or "" for graph in graphs for value in graph.graph.inputs} | set(targets))
        feeds = [{name: given[name] for value in graph.graph.inputs if (name := value.name)} for graph in graphs]
        results = [CpuGraph(graph)(feed) for graph, feed in zip(graphs, feeds, strict=True)]
        return {name: self._judged(name, [result[f"{name}{LOCAL}"] for result in results], given[name]) for name in targets}

    def one(self, target: str) -> tuple[ir.Model, ir.Model, Feed, np.ndarray]:
        """What computes one tensor in A and in B, from the same inputs; these, and A's tensor."""
        graphs = [cut(model, [target], self.pairs) for model in (self.a.model, self.b.model)]
        given = self._exact({value.name or "" for graph in graphs for value in graph.graph.inputs} | {target})
        names = {value.name for graph in graphs for value in graph.graph.inputs}
        return graphs[0], graphs[1], {name: array for name, array in given.items() if name in names}, given[target]

    def _cumulative(self, names: Sequence[str]) -> dict[str, Error]:
        exact = self._exact(set(names))
        results = [_run(model, names, self.feed) for model in (self.b.model, *self._noisy)]
        return {name: self._judged(name, [result[name] for result in results], exact[name]) for name in names}

    def _exact(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """A's tensors, and the feed's."""
        missing = [name for name in names if name not in self._held and name not in self.feed]
        if missing:
            self._held |= _run(self.a.model, missing, self.feed)
        return {name: self._held[name] if name in self._held else self.feed[name] for name in names}

    def _judged(self, name: str, results: Sequence[np.ndarray], exact: np.ndarray) -> Error:
        return judged(results[0], results[1:], exact)

    def _passes(self, names: Iterable[str]) -> Iterable[list[str]]:
        part: list[str] = []
        held = 0
        for name in names:
            part.append(name)
            held += self._sizes[name]
            if held > _PASS_BYTES:
                yield part
                part, held = [], 0
        if part:
            yield part


def _run(model: ir.Model, names: Sequence[str], feed: Feed) -> dict[str, np.ndarray]:
    outputs = {value.name for value in model.graph.outputs}
    results = CpuGraph(model, also=[name for name in names if name not in outputs])(feed)
    return {name: results[name] for name in names}


def _bytes(value: ir.Value, feed: Feed) -> int:
    rows = max((len(array) for array in feed.values() if array.ndim), default=1)
    dims = [dim if isinstance(dim, int) else _UNKNOWN_SIZE for dim in value.shape or [_UNKNOWN_SIZE**2]]
    if value.shape is not None and dims and not isinstance(value.shape[0], int):
        dims[0] = rows
    return math.prod(dims) * 4


def judged(actual: np.ndarray, rounded: Sequence[np.ndarray], exact: np.ndarray) -> Error:
    """`actual` against `exact`, and against how far `rounded` are: the same layers, rounded at random."""
    if actual.shape != exact.shape:
        return Error(error=math.inf, floor=0.0, times=math.inf)
    if exact.dtype.kind in "biu":
        differing = float(np.mean(actual != exact)) if exact.size else 0.0
        floor = float(np.mean([np.mean(each != exact) for each in rounded])) if exact.size else 0.0
        least = 1 / max(1, exact.size)
        return Error(error=differing, floor=floor, times=differing / max(floor, least) if differing > least else 0.0)
    whole = _rms(exact[np.isfinite(exact)], None)
    noise = np.sqrt(np.mean([np.square(_rms(_off(each, exact), None)) for each in rounded]))
    error = _rms(_off(actual, exact), None)
    scale = float(whole) or 1.0
    if not math.isfinite(float(error)):
        return Error(error=math.inf, floor=float(noise) / scale, times=math.inf)
    times = max(_times(actual, rounded, exact, axes, scale) for axes in _slicings(exact.ndim))
    return Error(error=float(error) / scale, floor=float(noise) / scale, times=times)


def _slicings(rank: int) -> list[tuple[int, ...] | None]:
    """Over which axes to average: all; and all but the channels of images, and of vectors."""
    by_axis = {axis: tuple(other for other in range(rank) if other != axis) for axis in (1, rank - 1) if 0 < axis < rank}
    return [None, *by_axis.values()]


def _times(
    actual: np.ndarray, rounded: Sequence[np.ndarray], exact: np.ndarray, axes: tuple[int, ...] | None, scale: float
) -> float:
    """The largest ratio of error to floor over slices, less what chance makes of the few elements of a slice.

    The root mean square of n independent errors scatters by 1 / sqrt(2 n) of itself, so that of two the logarithm of their ratio
    scatters by 1 / sqrt(n): the ratio must be beyond exp(3 / sqrt(n)), or of the
    largest of many slices exp(5 / sqrt(n)). Of errors of different size, n = (sum e^2)^2 / sum e^4.
    """
    if not exact.size:
        return 0.0
    error = _rms(_off(actual, exact), axes)
    noise = np.square(np.stack([_off(each, exact) for each in rounded]))
    inner = None if axes is None else (0, *(axis + 1 for axis in axes))
    count = np.square(noise.sum(axis=inner)) / np.maximum(np.square(noise).sum(axis=inner), 1e-300) / len(rounded)
    floor = np.sqrt(noise.mean(axis=inner))
    floor = np.maximum(floor, max(_SMALLEST * scale, _LEAST_OF_WHOLE * math.sqrt(float(noise.mean()))))
    sigmas = _SIGMAS if axes is None else _SIGMAS_OF_SLICES
    times = error / floor / np.exp(sigmas / np.sqrt(np.maximum(count, 1.0)))
    return float(np.max(times)) / (1.0 if axes is None else _OF_SLICES)


def _off(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The difference, 0 where both are the same infinity or NaN; infinite where one alone is not finite."""
    with np.errstate(invalid="ignore"):
        off: np.ndarray = np.subtract(actual, exact, dtype=np.float64)
    odd = ~np.isfinite(off)
    if odd.any():
        same = (actual == exact) | (np.isnan(actual) & np.isnan(exact))
        off[odd] = np.where(same[odd], 0.0, np.inf)
    return off


def _rms(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    return np.sqrt(np.mean(np.square(array, dtype=np.float64), axis=axes)) if array.size else np.asarray(0.0)
