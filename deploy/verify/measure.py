"""The error of every tensor of B against A's: as it runs, and fed A's own tensors, beside the noise floor of each."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploy.artifact.tensors import Feed
from deploy.precision.cpu import CpuGraph
from deploy.precision.ranges import Range, activation_ranges
from deploy.progress import Progress
from deploy.verify.error import Error, judged
from deploy.verify.floor import SEEDS, before_bias, noisy
from deploy.verify.graphs import LOCAL, Graph, cut

_PASS_BYTES = 64 << 20
"""Tensors held at a time; a graph is run in as many passes as that takes."""

_UNKNOWN_SIZE = 64


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

    eager: A's tensors of `pairs`, in place of those that its graph computes, and the same with the rounding of another program.
    """

    def __init__(
        self,
        a: Graph,
        b: Graph,
        pairs: Sequence[str],
        feed: Feed,
        progress: Progress,
        *,
        eager: Callable[[Collection[str]], tuple[Feed, Feed]] | None = None,
    ) -> None:
        self.a, self.b, self.pairs = a, b, tuple(pairs)
        self.feed = feed
        self._eager = eager
        self._progress = progress
        self._held: dict[str, np.ndarray] = {}
        self._others: Feed = {}
        progress("reading ranges")
        self.ranges = activation_ranges(a.model, [feed])
        amax = {name: found.amax for name, found in self.ranges.items()}
        self._noisy = [noisy(a, b, amax, seed) for seed in range(SEEDS)]
        self._before_bias = before_bias(a, b)
        self._sizes = {name: _bytes(value, feed) for name, value in a.values().items()}

    def layers(self) -> list[Layer]:
        """Every pair, in the order of B. Raises PrecisionError where a graph cannot be run."""
        found: list[Layer] = []
        for part in self._passes(self.pairs):
            self._progress("comparing layers", len(found), len(self.pairs))
            local, cumulative = self._local(part), self._cumulative(part)
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

    def local(self, targets: Iterable[str], without: Collection[str] = ()) -> dict[str, Error]:
        """The errors of `targets`, each computed from A's tensors; those of `without` are not fed, but computed."""
        errors: dict[str, Error] = {}
        for part in self._passes(targets):
            errors |= self._local(part, without)
            self._held.clear()
        return errors

    def _local(self, targets: Sequence[str], without: Collection[str] = ()) -> dict[str, Error]:
        left_out = set(without)
        fed = [name for name in self.pairs if name not in left_out]
        graphs = [cut(self.b.model, targets, fed)]
        fed = [name for name in fed if name not in self._before_bias]
        graphs += [cut(model, targets, fed) for model in self._models()[1:]]
        given = self._exact({name for graph in graphs for name in _inputs(graph)} | set(targets))
        results = [CpuGraph(graph)({name: given[name] for name in _inputs(graph)}) for graph in graphs]
        return {name: self._judged(name, [each[f"{name}{LOCAL}"] for each in results], given[name]) for name in targets}

    def outputs(self, results: Feed) -> dict[str, Error]:
        """The errors of outputs that something else has made of the feed."""
        exact = self._exact(results)
        others = [_run(model, list(results), self.feed) for model in self._models()[1:]]
        errors = {name: self._judged(name, [each[name] for each in (results, *others)], exact[name]) for name in results}
        self._held.clear()
        return errors

    def exact(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """A's tensors, one by one."""
        for part in self._passes(names):
            yield from self._exact(part).items()
            self._held.clear()

    def one(self, target: str) -> tuple[ir.Model, ir.Model, Feed, np.ndarray]:
        """What computes one tensor in A and in B, from the same inputs; these, and A's tensor."""
        graphs = [cut(model, [target], self.pairs) for model in (self.a.model, self.b.model)]
        names = {name for graph in graphs for name in _inputs(graph)}
        given = self._exact(names | {target})
        return graphs[0], graphs[1], {name: array for name, array in given.items() if name in names}, given[target]

    def _cumulative(self, names: Sequence[str]) -> dict[str, Error]:
        exact = self._exact(set(names))
        results = [_run(model, names, self.feed) for model in self._models()]
        return {name: self._judged(name, [each[name] for each in results], exact[name]) for name in names}

    def _models(self) -> list[ir.Model]:
        """B's graph, and A's with random rounding; A's itself where its tensors are another's."""
        return [self.b.model, *self._noisy, *([self.a.model] if self._eager else [])]

    def _judged(self, name: str, results: Sequence[np.ndarray], exact: np.ndarray) -> Error:
        """results: of `_models`."""
        if not self._eager:
            return judged(results[0], results[1:], exact)
        *rounded, middle = results[1:]
        return judged(results[0], [*rounded, middle + (self._others[name] - exact)], exact, middle)

    def _exact(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """A's tensors, and the feed's."""
        missing = [name for name in names if name not in self._held and name not in self.feed]
        if missing:
            if self._eager is None:
                self._held |= _run(self.a.model, missing, self.feed)
            else:
                exact, self._others = self._eager(names)
                self._held |= exact
        return {name: self._held[name] if name in self._held else self.feed[name] for name in names}

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


def _inputs(model: ir.Model) -> list[str]:
    return [value.name or "" for value in model.graph.inputs]


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
