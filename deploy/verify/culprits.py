"""Which of the layers that are beyond the floor are culprits, and which were only rewritten together with their readers."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import onnx_ir as ir

from deploy.verify.error import CLEAN, Error
from deploy.verify.graphs import reads, unlike_pairs
from deploy.verify.measure import Comparison, Layer

_STEPS = 12
"""How many layers a tensor of other units may pass through before a layer undoes it: those of an attention pass its reshapes, transposes and products."""

_BETTER, _WORSE = 0.5, 1.2
"""By how much the error of a layer with a fault changes from A's tensor to B's, if B's is the one that it was made for."""

_OTHER_UNITS = 0.05
"""The relative error of a tensor that is in other units for a reason."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """culprits: the tensors whose layer computes something else than A's by itself, in order.

    rewritten: tensors that B computes in other units, which the layers behind them undo, as equalization and smoothing do; with
        the layers that undo them, whose errors, taken together with what is before them, are in `undone`.
    """

    culprits: tuple[str, ...]
    rewritten: Mapping[str, tuple[str, ...]]
    undone: Mapping[str, Error]


@dataclass(frozen=True, kw_only=True)
class _Trail:
    """What is behind a suspect.

    passed: the tensors in other units so far, itself first, each with the nearest suspect before it, or itself. targets: the next ones,
    which may undo that. undone: the errors of the layers that did. right: what was right once, before more was passed. broken: layers that were to undo it, and have a fault of their own.
    ended: there is nothing more to look at.
    """

    passed: Mapping[str, str]
    targets: tuple[str, ...] = ()
    steps: int = 0
    undone: Mapping[str, Error] = field(default_factory=dict)
    right: frozenset[str] = frozenset()
    broken: tuple[str, ...] = ()
    ended: bool = False

    @property
    def first(self) -> str:
        return next(iter(self.passed))

    @property
    def blamed(self) -> tuple[str, ...]:
        """The culprits, at the end. Of layers that are all broken, what they read is the likelier one."""
        others = self.first not in self.broken and (self.undone or len(self.broken) == 1)
        return self.broken if others else (self.first,)

    def crosses(self, other: "_Trail") -> bool:
        return bool({*self.passed, *self.targets} & {*other.passed, *other.targets})


def culprits(comparison: Comparison, layers: Sequence[Layer]) -> Found:
    """Raises PrecisionError where a graph cannot be run.

    Trails that do not cross are followed in one run, so that the runs do not grow with the number of suspects.
    """
    readers = _readers(comparison.b.model, comparison.pairs)
    suspects = {layer.tensor: layer.local for layer in layers if layer.local.beyond}
    unlike = unlike_pairs(comparison.b) & suspects.keys()
    taken = _taken_back(layers, readers, suspects, unlike)
    search = _Search(readers=readers, suspects=suspects, unlike=unlike)
    trails = {
        name: search.further(_Trail(passed={name: name}))
        for name in suspects
        if name not in {*unlike, *taken.units, *taken.undone}
    }
    while following := _together(trails):
        targets = [target for trail in following.values() for target in trail.targets]
        errors = comparison.local(targets, without=[name for trail in following.values() for name in trail.passed])
        for name, trail in following.items():
            trails[name] = search.followed(trail, errors)
    found = _found(trails)
    return Found(
        culprits=tuple(name for name in suspects if name in {*found.culprits, *unlike}),
        rewritten={name: () for name in suspects if name in taken.units} | dict(found.rewritten),
        undone={name: error for name, error in taken.undone.items() if name in suspects} | dict(found.undone),
    )


class _Taken(NamedTuple):
    """units: the tensors in other units. undone: the errors, as B runs, of what takes them back."""

    units: set[str]
    undone: dict[str, Error]


def _taken_back(
    layers: Sequence[Layer], readers: Mapping[str, Collection[str]], suspects: Collection[str], unlike: Collection[str]
) -> _Taken:
    """What is A's in other units as B runs, and taken back before an output.

    Behind an operand that is quantized in one way and read back in another, nothing can be said, and that is the fault.
    """
    behind: set[str] = set()
    for layer in layers:
        if layer.tensor in unlike or layer.tensor in behind:
            behind |= {layer.tensor, *readers[layer.tensor]}
    fine: set[str] = set()
    units: set[str] = set()
    wanted: set[str] = set()  # by a layer behind that is wrong on A's own tensor
    for layer in reversed(layers):
        error, name = layer.cumulative, layer.tensor
        if error.beyond and (error.scaled or error.left == math.inf > error.error):  # of few numbers nobody can tell
            units.add(name)
        if any(reader in suspects or reader in wanted & units for reader in readers[name]):
            wanted.add(name)
        if name in behind or not error.beyond or (name in units and readers[name] and fine.issuperset(readers[name])):
            fine.add(name)
    fine -= set(unlike)
    units &= fine & wanted
    takes = {reader for name in units for reader in readers[name]} - units
    return _Taken(units, {layer.tensor: layer.cumulative for layer in layers if layer.tensor in takes & fine})


@dataclass(frozen=True, kw_only=True)
class _Search:
    """readers: for each tensor the next ones. suspects: what is beyond the floor, fed A's tensors, with its error. unlike: those with
    a fault of their own for certain.
    """

    readers: Mapping[str, Collection[str]]
    suspects: Mapping[str, Error]
    unlike: Collection[str]

    def further(self, trail: _Trail) -> _Trail:
        """With the next targets. It ends where no other suspect is near behind it, for that alone could undo anything."""
        known = {*trail.passed, *trail.undone, *trail.broken}
        next_ones = {name: [target for target in self.readers[name] if target not in known] for name in trail.passed}
        targets = dict.fromkeys(target for each in next_ones.values() for target in each)
        if self._behind(targets, _STEPS - trail.steps) & (self.suspects.keys() - known):
            return replace(trail, targets=tuple(targets))
        loose = [trail.passed[name] for name, each in next_ones.items() if each or not self.readers[name]]
        if loose and not self.suspects[trail.first].scaled:
            loose = [trail.first]
        return replace(trail, targets=(), ended=True, broken=tuple(dict.fromkeys((*trail.broken, *loose))))

    def followed(self, trail: _Trail, errors: Mapping[str, Error]) -> _Trail:
        """One layer further, fed B's tensors from the first on.

        What undoes the first is beyond the floor when it is fed A's tensor, and within it now. Where the first is A's in other units, a
        layer that is beyond the floor both ways, and not the worse for B's units, takes them and has a fault of its own; what is
        neither right nor A's in other units does not take them: the suspect before it is wrong.
        """
        scaled = self.suspects[trail.first].scaled
        passed, undone, broken, right = dict(trail.passed), dict(trail.undone), list(trail.broken), set(trail.right)
        for target in trail.targets:
            error = errors[target]
            owner = next(trail.passed[name] for name in reversed(list(trail.passed)) if target in self.readers[name])
            if target in self.unlike:
                broken.append(target)
            elif error.times <= CLEAN:
                right.add(target)
                undone |= {target: error} if target in self.suspects else {}
            elif scaled and not error.scaled:
                own = target not in right and self._takes(trail.first, target, error)
                broken.append(target if own else owner)
            else:
                passed[target] = target if target in self.suspects else owner
        again = {target for name in passed.keys() - trail.passed.keys() for target in self.readers[name]}
        undone = {target: error for target, error in undone.items() if target not in again}
        now = replace(
            trail,
            passed=passed,
            steps=trail.steps + 1,
            undone=undone,
            right=frozenset(right),
            broken=tuple(dict.fromkeys(broken)),
        )
        return replace(now, targets=(), ended=True) if trail.first in broken else self.further(now)

    def _takes(self, first: str, target: str, error: Error) -> bool:
        """Whether a layer with a fault of its own was made for B's units: they make it better, or differ much and do not make it worse."""
        alone = self.suspects.get(target)
        if alone is None:
            return False
        differs = self.suspects[first].error > _OTHER_UNITS
        return error.error < _BETTER * alone.error or (differs and error.error <= _WORSE * alone.error)

    def _behind(self, targets: Collection[str], steps: int) -> set[str]:
        """The tensors that are computed from these within so many layers, these included."""
        found: set[str] = set()
        for _ in range(steps):
            found |= set(targets)
            targets = {target for name in targets for target in self.readers[name]}
        return found


def _together(trails: Mapping[str, _Trail]) -> dict[str, _Trail]:
    """Trails that are not at their end and do not cross, less those of suspects that earlier ones have settled."""
    settled = _settled(trails)
    found: dict[str, _Trail] = {}
    for name, trail in trails.items():
        if not trail.ended and name not in settled and not any(trail.crosses(other) for other in found.values()):
            found[name] = trail
    return found


def _settled(trails: Mapping[str, _Trail]) -> set[str]:
    """The suspects on the trail of an earlier one that is not to blame: they undo it, or pass it on, or are to blame."""
    settled: set[str] = set()
    for name, trail in trails.items():
        if trail.ended and name not in settled and name not in trail.blamed:
            settled |= {*trail.passed, *trail.undone, *trail.broken} - {name}
    return settled


def _found(trails: Mapping[str, _Trail]) -> Found:
    settled = _settled(trails)
    own = {name: trail for name, trail in trails.items() if name not in settled}
    blamed = {name for trail in own.values() for name in trail.blamed}
    fine = {name: trail for name, trail in own.items() if name not in blamed}
    return Found(
        culprits=tuple(name for name in trails if name in blamed),
        rewritten={
            name: tuple(trail.undone) for trail in fine.values() for name in trail.passed if name in trails and name not in blamed
        },
        undone={target: error for trail in fine.values() for target, error in trail.undone.items()},
    )


def _readers(model: ir.Model, pairs: Collection[str]) -> dict[str, list[str]]:
    """For each paired tensor, the next paired tensors that are computed from it."""
    names = set(pairs)
    readers: dict[str, list[str]] = {name: [] for name in pairs}
    sources: dict[int, set[str]] = {}  # by the identity of a value: the nearest paired tensors before it
    for node in model.graph:
        before: set[str] = set()
        for value in reads(node):
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
