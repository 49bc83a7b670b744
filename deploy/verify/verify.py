"""`deploy.verify`: where two artifacts of one network part, layer by layer, and which layer is the culprit."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.tensors import Feed, row_count
from deploy.data.evidence_feeds import NamedFeed, parity_feeds, real_data
from deploy.errors import BackendError, UsageError
from deploy.progress import Progress, silent
from deploy.runtime.load import open_session
from deploy.verify.culprits import Found, culprits
from deploy.verify.error import Error
from deploy.verify.graphs import Graph, paired
from deploy.verify.hints import hints
from deploy.verify.measure import Comparison, Layer
from deploy.verify.reproduce import Reproduction, check_folder, write_reproduction

if TYPE_CHECKING:
    from deploy.verify.eager import EagerTensors

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    rows, data: of the input that both ran on. eager: whether A's tensors are those of its module. layers: every tensor that both compute, in order; `local` of one whose units were
    rewritten is that of the layers that undo it. unpaired: how many tensors of A have no counterpart in B. outputs: by name.
    culprits: the layers that compute something else by themselves, in order. rewritten: tensors in other units in B, which the
    layers behind them undo. engine: where B is one, the errors of the outputs that it has made itself, or why it did not run here. beyond: the
    outputs that part beyond the floor, an engine's included.
    """

    a: str
    b: str
    data: str
    rows: int
    layers: list[Layer]
    unpaired: int
    outputs: dict[str, Error]
    culprits: list[Layer]
    rewritten: list[str]
    hints: dict[str, str] = field(default_factory=dict)
    reproduction: Reproduction | None = None
    eager: bool = False
    engine: dict[str, Error] | str | None = None

    @property
    def shown_a(self) -> str:
        return f"the module of {self.a}" if self.eager else self.a

    @property
    def beyond(self) -> list[str]:
        ran = self.engine if isinstance(self.engine, dict) else {}
        return [name for name, error in self.outputs.items() if error.beyond or (name in ran and ran[name].beyond)]

    @property
    def victims(self) -> list[Layer]:
        """Layers that are right by themselves and beyond the floor as B runs."""
        others = {*(layer.tensor for layer in self.culprits), *self.rewritten}
        return [layer for layer in self.layers if layer.cumulative.beyond and layer.tensor not in others]

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinities as strings, because JSON has none."""
        return {
            "schema": SCHEMA,
            "a": self.a,
            "b": self.b,
            "eager": self.eager,
            "data": self.data,
            "rows": self.rows,
            "unpaired": self.unpaired,
            "beyond": self.beyond,
            "outputs": {name: _error(error) for name, error in self.outputs.items()},
            "engine": {name: _error(error) for name, error in self.engine.items()}
            if isinstance(self.engine, dict)
            else self.engine,
            "culprits": [_layer(layer) | {"hint": self.hints.get(layer.tensor, "")} for layer in self.culprits],
            "rewritten": self.rewritten,
            "layers": [_layer(layer) for layer in self.layers],
            "reproduction": None if self.reproduction is None else self.reproduction.to_json(),
        }


def verify(
    a: Artifact | Path | str,
    b: Artifact | Path | str,
    *,
    data: Path | str | None = None,
    reproduce: Path | str | None = None,
    eager: bool = False,
    progress: Progress = silent,
) -> Verification:
    """Compare `b` with `a` layer by layer, as it runs and layer by layer on A's own tensors.

    data: an ImageFolder or a folder of `.npz` feeds; None: random numbers. reproduce: the folder that the smallest file that shows
    the first culprit is written to. eager: A's tensors are those of its PyTorch module, whose code is run, and not those of its
    ONNX file. Of an engine, the typed ONNX file that it was built from is compared, and what it computes itself where it can run.

    Raises UsageError where the two are not of one network, ArtifactError, DataError, PrecisionError, BackendError and OutputError.
    """
    first, second = (each if isinstance(each, Artifact) else open_artifact(each) for each in (a, b))
    for each in (first, second):
        if each.manifest.kind == "package":
            raise UsageError(
                f"{each.shown} is a compiled package, which has no layers to look at: name the artifact it was built from"
            )
        each.verify(weights=False)
    if reproduce is not None:
        check_folder(Path(reproduce))
    feed = verification_feed(first, None if data is None else Path(data))
    progress("reading the graphs")
    graphs = Graph.read(first), Graph.read(second)
    pairs = paired(*graphs)
    tensors = _eager_tensors(first, graphs[0], feed.feed) if eager else None
    if tensors is not None:
        pairs = [name for name in pairs if name in tensors.names]
    comparison = Comparison(*graphs, pairs, feed.feed, progress, eager=tensors)
    layers = comparison.layers()
    progress("looking for the culprit")
    found = culprits(comparison, layers)
    guilty = [layer for layer in layers if layer.tensor in found.culprits]
    outputs = {value.name or "": value for value in graphs[0].model.graph.outputs}
    return Verification(
        a=first.shown,
        b=second.shown,
        eager=eager,
        data=feed.data,
        rows=row_count(feed.feed),
        layers=[_settled(layer, found) for layer in layers],
        unpaired=len(set(graphs[0].values()) - set(pairs)),
        outputs={layer.tensor: layer.cumulative for layer in layers if layer.tensor in outputs},
        culprits=guilty,
        rewritten=list(found.rewritten),
        hints=hints(comparison, guilty),
        engine=_engine_outputs(second, comparison) if second.manifest.kind == "engine" else None,
        reproduction=write_reproduction(comparison, guilty[0], Path(reproduce)) if guilty and reproduce is not None else None,
    )


def verification_feed(artifact: Artifact, data: Path | None) -> NamedFeed:
    """The feed of the most rows that evidence is made with."""
    feeds = [feed for feed in parity_feeds(artifact, real_data(artifact, data)) if not feed.maybe]
    return max(feeds, key=lambda feed: row_count(feed.feed))


def _eager_tensors(artifact: Artifact, graph: Graph, feed: Feed) -> "EagerTensors":
    from deploy.verify.eager import EagerTensors  # loads torch

    return EagerTensors(artifact, graph.model, feed)


def _engine_outputs(engine: Artifact, comparison: Comparison) -> dict[str, Error] | str:
    """The errors of what the engine makes of the feed; or why it cannot run here."""
    try:
        session = open_session(engine)
    except BackendError as error:
        return str(error)
    with session:
        dtypes = {spec.name: spec.dtype for spec in session.inputs}
        return comparison.outputs(session.run({name: array.astype(dtypes[name]) for name, array in comparison.feed.items()}))


def _settled(layer: Layer, found: Found) -> Layer:
    """With the errors of what undoes it, of what it undoes, or of what other units leave of it, in place of those in other units."""
    if layer.tensor in found.undone:
        return replace(layer, local=found.undone[layer.tensor])
    if layer.tensor not in found.rewritten:
        return layer
    undoing = [found.undone[name] for name in found.rewritten[layer.tensor] if name in found.undone]
    if not undoing:
        scaled = replace(layer.cumulative, times=layer.cumulative.left)
        return replace(layer, local=scaled, cumulative=scaled)
    worst = max(undoing, key=lambda error: error.times)
    return replace(layer, local=worst, cumulative=worst)


def _error(error: Error) -> dict[str, Any]:
    return {"error": _number(error.error), "floor": _number(error.floor), "times": _number(error.times)}


def _number(value: float) -> float | str:
    return float(value) if np.isfinite(value) else str(float(value))


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "tensor": layer.tensor,
        "node": layer.node,
        "operator": layer.operator,
        "module": layer.module,
        "source": layer.source,
        "local": _error(layer.local),
        "cumulative": _error(layer.cumulative),
        "range": None if layer.range is None else [_number(layer.range.low), _number(layer.range.high)],
    }
