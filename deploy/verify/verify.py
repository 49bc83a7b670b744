"""`deploy.verify`: where two artifacts of one network part, layer by layer, and which layer is the culprit."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.tensors import row_count
from deploy.data.evidence_feeds import NamedFeed, parity_feeds, real_data
from deploy.errors import UsageError
from deploy.progress import Progress, silent
from deploy.verify.culprits import culprits
from deploy.verify.graphs import Graph, paired
from deploy.verify.measure import Comparison, Error, Layer
from deploy.verify.reproduce import Reproduction, check_folder, write_reproduction

SCHEMA = 1
_FP16_MAX = 65504.0


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    rows, data: of the input that both ran on. layers: every tensor that both compute, in order; `local` of one whose units were
    rewritten is that of the layers that undo it. unpaired: how many tensors of A have no counterpart in B. outputs: by name.
    culprits: the layers that compute something else by themselves, in order. rewritten: tensors in other units in B, which the
    layers behind them undo. beyond: the outputs that part beyond the floor.
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

    @property
    def beyond(self) -> list[str]:
        return [name for name, error in self.outputs.items() if error.beyond]

    @property
    def victims(self) -> list[Layer]:
        """Layers that are right by themselves and beyond the floor as B runs."""
        return [layer for layer in self.layers if layer.cumulative.beyond and layer not in self.culprits]

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinities as strings, because JSON has none."""
        return {
            "schema": SCHEMA,
            "a": self.a,
            "b": self.b,
            "data": self.data,
            "rows": self.rows,
            "unpaired": self.unpaired,
            "beyond": self.beyond,
            "outputs": {name: _error(error) for name, error in self.outputs.items()},
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
    progress: Progress = silent,
) -> Verification:
    """Compare `b` with `a` layer by layer, as it runs and layer by layer on A's own tensors.

    data: an ImageFolder or a folder of `.npz` feeds; None: random numbers. reproduce: the folder that the smallest file that shows the
    first culprit is written to. Of engines, the typed ONNX file that they were built from is compared. Raises UsageError where the two are
    not of one network, ArtifactError, DataError, PrecisionError, BackendError and OutputError.
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
    comparison = Comparison(*graphs, pairs, feed.feed, progress)
    layers = comparison.layers()
    progress("looking for the culprit")
    found = culprits(comparison, layers)
    guilty = [layer for layer in layers if layer.tensor in found.culprits]
    outputs = {value.name or "": value for value in graphs[0].model.graph.outputs}
    return Verification(
        a=first.shown,
        b=second.shown,
        data=feed.data,
        rows=row_count(feed.feed),
        layers=[_settled(layer, found.rewritten, found.undone) for layer in layers],
        unpaired=len(set(graphs[0].values()) - set(pairs)),
        outputs={layer.tensor: layer.cumulative for layer in layers if layer.tensor in outputs},
        culprits=guilty,
        rewritten=list(found.rewritten),
        hints={layer.tensor: _hint(layer, second) for layer in guilty},
        reproduction=write_reproduction(comparison, guilty[0], Path(reproduce)) if guilty and reproduce is not None else None,
    )


def verification_feed(artifact: Artifact, data: Path | None) -> NamedFeed:
    """The feed of the most rows that evidence is made with."""
    feeds = [feed for feed in parity_feeds(artifact, real_data(artifact, data)) if not feed.maybe]
    return max(feeds, key=lambda feed: row_count(feed.feed))


def _settled(layer: Layer, rewritten: Any, undone: Any) -> Layer:
    if layer.tensor in undone:
        return Layer(**{**vars(layer), "local": undone[layer.tensor]})
    if layer.tensor in rewritten:
        errors = [undone[name] for name in rewritten[layer.tensor]]
        return Layer(
            **{
                **vars(layer),
                "local": max(errors, key=lambda error: error.times),
                "cumulative": max(errors, key=lambda error: error.times),
            }
        )
    return layer


def _hint(layer: Layer, artifact: Artifact) -> str:
    """What would help, where that is known."""
    precision = artifact.manifest.precision
    largest = layer.range.amax if layer.range else 0.0
    if precision == "fp16" and (largest > _FP16_MAX or not math.isfinite(layer.local.error)):
        return f"its values reach {largest:.3g}, and FP16 ends at {_FP16_MAX:g}: `deploy convert --data` with such input keeps it in FP32, or --bf16"
    if precision.startswith("int8"):
        return f"deploy quantize --exclude '{layer.node}' leaves it in floating point"
    return ""


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
