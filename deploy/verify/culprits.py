"""Which of the layers that are beyond the floor are culprits, and which were only rewritten together with their readers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from deploy.verify.measure import CLEAN, Comparison, Error, Layer

_STEPS = 6
"""How many layers a tensor of other units may pass through before a layer undoes it."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """culprits: the tensors whose layer computes something else than A's by itself, in order.

    rewritten: tensors that B computes in other units, which the layers behind them undo, as equalization and smoothing do; with
        the errors of these layers, taken together with what is before them.
    """

    culprits: tuple[str, ...]
    rewritten: Mapping[str, tuple[str, ...]]
    undone: Mapping[str, Error]


def culprits(comparison: Comparison, layers: Sequence[Layer]) -> Found:
    """Raises PrecisionError where a graph cannot be run."""
    suspects = [layer.tensor for layer in layers if layer.local.beyond]
    readers = _readers(comparison.b.model, comparison.pairs)
    settled: dict[str, Error] = {}
    rewritten: dict[str, tuple[str, ...]] = {}
    found: list[str] = []
    for name in suspects:
        if name in settled:
            continue
        undone = _undone(comparison, name, suspects, readers)
        if undone is None:
            found.append(name)
        else:
            settled |= undone
            rewritten[name] = tuple(undone)
    return Found(culprits=tuple(found), rewritten=rewritten, undone=settled)


def _undone(
    comparison: Comparison, name: str, suspects: Collection[str], readers: Mapping[str, Collection[str]]
) -> dict[str, Error] | None:
    """The layers that undo what `name` has in other units, with their errors; None where that is not so.

    Such layers are beyond the floor when they are fed A's tensor, and within it when they are fed B's.
    """
    passed = [name]
    for _ in range(_STEPS):
        targets = [target for each in passed for target in readers.get(each, ()) if target not in passed]
        if not targets or not set(suspects) - set(passed):
            return None
        errors = comparison.local(dict.fromkeys(targets), without=passed)
        failing = [target for target, error in errors.items() if error.times > CLEAN]
        if not failing:
            return errors if all(target in suspects for target in targets) else None
        passed += failing
    return None


def _readers(model: ir.Model, pairs: Collection[str]) -> dict[str, list[str]]:
    """For each paired tensor, the next paired tensors that are computed from it."""
    names = set(pairs)
    readers: dict[str, list[str]] = {name: [] for name in pairs}
    sources: dict[int, set[str]] = {}  # by the identity of a value: the nearest paired tensors before it
    for node in model.graph:
        before: set[str] = set()
        for value in _read(node):
            if value.name in names:
                before.add(value.name or "")
            else:
                before |= sources.get(id(value), set())
        for value in node.outputs:
            if value.name in names:
                for name in before:
                    readers[name].append(value.name or "")
            else:
                sources[id(value)] = before
    return readers


def _read(node: ir.Node) -> list[ir.Value]:
    """What a node and the graphs inside it read."""
    read = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            read += [value for inner in attribute.as_graph().all_nodes() for value in inner.inputs if value is not None]
    return read
