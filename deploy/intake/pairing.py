"""Pairs the tensors of a checkpoint with those of a module: by names without the prefixes of wrappers, or by order."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deploy.errors import CheckpointError, UsageError
from deploy.intake.fileformat import shard_of
from deploy.intake.options import Match

USUAL = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "model", "net", "network")
"""Names that wrappers and training modules usually give to the net. Of two sets of names, those under them come first."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""What DataParallel, torch.compile, FSDP, activation checkpointing and DeepSpeed put into the middle of names, when a part of
the net was wrapped."""

COUNTER = "num_batches_tracked"


class Pairing(NamedTuple):
    """keys: the checkpoint's keys by the module's names, and by other names that the module does not have.

    stripped: the prefixes that were removed, in order; `.module.` is one in the middle of names.
    kept: whole numbers of the module that the checkpoint, matched by order, has no counterpart of.
    """

    keys: dict[str, str]
    stripped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state_dict of `module` by name."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def place(state: Mapping[str, Tensor]) -> str:
    """Where `state` came from, for messages."""
    path = getattr(state, "path", None)
    key = getattr(state, "found_under", "")
    notes = [shard_of(path) if path else None, repr(key) if key else None]
    shown = ", ".join(filter(None, notes))
    return f"{path or 'the checkpoint'}{f' ({shown})' if shown else ''}"


def pair_tensors(module: nn.Module, state: Mapping[str, Tensor], match: Match) -> Pairing:
    """The pairing of `state` with the tensors of `module`.

    Raises CheckpointError when names fit in two ways, or the file has no order; UsageError for an unknown `match`.
    """
    if match == "order":
        if not getattr(state, "ordered", True):
            raise CheckpointError(
                f"{place(state)} cannot be matched by order: safetensors sorts its tensors, as an index of shards does;"
                " rename them, or give one file that torch.save wrote"
            )
        return _in_order(tensors_of(module), state)
    if match != "name":
        raise UsageError(f"unknown match {match!r}; expected name or order")
    stripped = _prefixes(tensors_of(module), state)
    return Pairing({strip(key, stripped): key for key in state}, stripped)


def strip(name: str, prefixes: Sequence[str]) -> str:
    """`name` without `prefixes`; one that begins with a dot is taken out of the middle."""
    for prefix in prefixes:
        if prefix.startswith(".") and prefix.strip("."):
            while prefix in name:
                name = name.replace(prefix, ".")
        else:
            name = name.removeprefix(prefix)
    return name


def same_shape(target: Tensor, tensor: Tensor) -> bool:
    """Whether `tensor` has the shape of `target`, which has none yet if it is lazy."""
    if is_lazy(target):
        return True
    return tensor.shape == target.shape or (target.dim() == 0 and tensor.shape == (1,))  # torch 0.3 saved scalars this way


class _Fit(NamedTuple):
    """How well names fit: the tensors that have a counterpart of their shape, and those that have one at all."""

    shaped: int
    named: int


def _prefixes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The fewest prefixes, of any name, whose removal makes the most names match."""
    expected = {name: tensor for name, tensor in expected.items() if not name.endswith(COUNTER)}
    inside = [f".{name}." for name in WRAPPERS if any(f".{name}." in key for key in state)]
    best: tuple[str, ...] = ()
    most = _fit_without(expected, state, ())
    for count in range(len(inside) + 1):
        for infixes in combinations(inside, count):
            found = _with_leading(expected, state, infixes)
            if found is not None and (fit := _fit_without(expected, state, found)) > most:
                best, most = found, fit
        if most.named == len(expected):
            break
    return best


def _with_leading(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], infixes: tuple[str, ...]
) -> tuple[str, ...] | None:
    """`infixes` and the leading prefixes that then make more names match, the best first; None if two names would become one."""
    taken = infixes
    while True:
        named = {strip(key, taken): tensor for key, tensor in state.items()}
        if len(named) < len(state):
            return taken[:-1] if len(taken) > len(infixes) else None
        fits = _leading(expected, named)
        most = max(fits.values())
        found = [prefix for prefix, fit in fits.items() if fit == most]
        if found[0] == "":
            return taken
        if len(found) > 1:
            found = [prefix for prefix in found if set(prefix[:-1].split(".")) <= set(USUAL)] or found
        if len(found) > 1:
            if 2 * most.shaped < len(expected):
                return taken  # what little fits may be chance
            raise CheckpointError(
                f"{place(state)} holds several sets of weights: their names begin with"
                f" {', '.join(map(repr, found[:10]))}; save the one you want to a separate file"
            )
        taken = (*taken, found[0])


def _leading(expected: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> dict[str, _Fit]:
    """How well the names fit as they are (""), and without each of what stands before an expected name, the shortest first."""
    gained: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in named.items():
        for end in _ends(name):
            if end in expected:
                gained.setdefault(name[: len(name) - len(end)], []).append((end, tensor))
    matched = [(name, tensor) for name, tensor in named.items() if name in expected]
    fits = {"": _fit(expected, matched)}
    for prefix, found in sorted(gained.items(), key=lambda item: (len(item[0]), item[0])):
        if not any(end in named and not end.startswith(prefix) for end, _ in found):  # else two names would become one
            fits[prefix] = _fit(expected, [each for each in matched if not each[0].startswith(prefix)] + found)
    return fits


def _ends(name: str) -> Iterator[str]:
    """What follows each of the dots in `name`."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _fit_without(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], stripped: Sequence[str]) -> _Fit:
    return _fit(expected, [(name, tensor) for key, tensor in state.items() if (name := strip(key, stripped)) in expected])


def _fit(expected: Mapping[str, Tensor], found: Sequence[tuple[str, Tensor]]) -> _Fit:
    return _Fit(sum(same_shape(expected[name], tensor) for name, tensor in found), len(found))


def is_counter(name: str, tensor: Tensor) -> bool:
    """Whether `tensor` is a counter of BatchNorm, or looks like one: a single whole number."""
    if name.endswith(COUNTER):
        return True
    return not (is_lazy(tensor) or tensor.is_floating_point() or tensor.is_complex()) and tensor.shape in ((), (1,))


def _in_order(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Pairing:
    """Pairs tensors in order. Counters are passed over on either side, also where only their shape tells what they are."""
    keys = list(state)
    pairs: dict[str, str] = {}
    kept: list[str] = []
    at = 0
    for name, target in expected.items():
        if is_counter(name, target):
            if at < len(keys) and is_counter(keys[at], state[keys[at]]):
                if not (name.endswith(COUNTER) or keys[at].endswith(COUNTER)):
                    pairs[name] = keys[at]
                at += 1
            if not (name in pairs or name.endswith(COUNTER)):
                kept.append(name)
            continue
        scalar = not is_lazy(target) and target.dim() == 0
        # A counter that was converted to floating point with the weights is a scalar too.
        while at < len(keys) and (is_counter(keys[at], state[keys[at]]) or (state[keys[at]].dim() == 0 and not scalar)):
            at += 1
        if at < len(keys):
            pairs[name] = keys[at]
            at += 1
    return Pairing(pairs, (), tuple(kept))


def contradiction(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], pairs: Mapping[str, str]
) -> tuple[str, str] | None:
    """The first name and key, paired by order, that do not belong together by what their names end in; None if all may.

    Where both sides use the same words for tensors of the same shape (`q.weight`, `k.weight`), these must come in the same
    order, `gamma` and `beta` counting as `weight` and `bias`. Words without digits must be paired with themselves too. Numbers
    may count from another start and leave some out, and must grow together where shapes do not tell the tensors apart. What
    belongs to one layer on this side must not come from two that each have their own.
    """
    same = [
        (_usual(name), _usual(key), name, key)
        for name, key in pairs.items()
        if not is_lazy(expected[name]) and same_shape(expected[name], state[key])
    ]
    found = _misplaced_word(same, expected, state)
    return found or _other_order(same, expected) or _torn_apart(same, state) or _falling_number(same, expected)


_SYNONYMS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
"""The last words of TensorFlow's normalization layers, which the first BERTs in torch have too, in torch's terms."""

_Same = tuple[str, str, str, str]
"""A name and the key paired with it, both in usual words and as they are."""


def _usual(name: str) -> str:
    """`name` with its last word in torch's terms."""
    owner, dot, word = name.rpartition(".")
    return f"{owner}{dot}{_SYNONYMS.get(word, word)}"


def _torn_apart(same: Sequence[_Same], state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The first name and key of a layer on this side whose other tensors come from a layer that has such a one of its own."""
    there = {_usual(key): tensor.shape for key, tensor in state.items()}
    origin: dict[str, str] = {}
    for name, key, own_name, own_key in same:
        owner, _, word = name.rpartition(".")
        from_, _, key_word = key.rpartition(".")
        if word != key_word:
            continue
        first = origin.setdefault(owner, from_)
        twin = f"{first}.{word}" if first else word
        if from_ != first and there.get(twin) == state[own_key].shape:
            return own_name, own_key
    return None


def _falling_number(same: Sequence[_Same], expected: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The first name and key where numbers grow on one side and fall on the other, among tensors of one shape and like names.

    `3x3` is no number: it is the size of a kernel.
    """
    last: dict[tuple[str, str, tuple[int, ...]], tuple[list[int], list[int]]] = {}
    for name, key, own_name, own_key in same:
        ours, theirs = ([int(number) for number in re.findall(_NUMBER, text)] for text in (name, key))
        like = (re.sub(_NUMBER, "#", name), re.sub(_NUMBER, "#", key), tuple(expected[own_name].shape))
        before = last.get(like)
        if before is not None and (ours > before[0]) != (theirs > before[1]):
            return own_name, own_key
        last[like] = (ours, theirs)
    return None


_NUMBER = r"(?<!\d)(?<!\dx)\d+(?!x\d|\d)"


def certain(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], pairs: Mapping[str, str]) -> bool:
    """Whether shapes and names prove a pairing by order: on both sides, no other tensor of the shape ends in what both share."""
    ours, theirs = (
        Counter((end, tuple(tensor.shape)) for name, tensor in side.items() if not is_lazy(tensor) for end in _all_ends(name))
        for side in (expected, state)
    )
    for name, key in pairs.items():
        ends = set(_all_ends(key))
        shared = (next(end for end in _all_ends(name) if end in ends), tuple(state[key].shape))
        if ours[shared] != 1 or theirs[shared] != 1:
            return False
    return True


def _all_ends(name: str) -> Iterator[str]:
    """`name`, what follows each of its dots, and nothing, which all names end in."""
    yield name
    yield from _ends(name)
    yield ""


def _misplaced_word(same: Sequence[_Same], expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    words = [
        {
            (end, tuple(tensor.shape))
            for name, tensor in side.items()
            if not is_lazy(tensor)
            for end in (_usual(name), *_ends(_usual(name)))
        }
        for side in (expected, state)
    ]
    for name, key, own_name, own_key in same:
        shape = tuple(expected[own_name].shape)
        ours, theirs = _where_they_part(name, key)
        digits = any(character.isdigit() for end in (ours, theirs) for character in end.partition(".")[0])
        if ours != theirs and not digits and (theirs, shape) in words[0] and (ours, shape) in words[1]:
            return own_name, own_key
    return None


def _where_they_part(name: str, key: str) -> tuple[str, str]:
    """The shortest ends of the two names that differ; two empty ones if one name is the end of the other."""
    ours, theirs = name.split("."), key.split(".")
    for count in range(1, min(len(ours), len(theirs)) + 1):
        if ours[-count] != theirs[-count]:
            return ".".join(ours[-count:]), ".".join(theirs[-count:])
    return "", ""


def _other_order(same: Sequence[_Same], expected: Mapping[str, Tensor]) -> tuple[str, str] | None:
    deepest = max((name.count(".") + 1 for each in same for name in each[:2]), default=0)
    for depth in range(1, deepest + 1):
        ours, theirs = (
            [(".".join(each[side].split(".")[-depth:]), tuple(expected[each[2]].shape)) for each in same] for side in (0, 1)
        )
        counts = Counter(ours), Counter(theirs)
        shared = {word for word in counts[0] if counts[0][word] == counts[1][word]}
        for word, at in zip(
            (word for word in ours if word in shared), (index for index, word in enumerate(theirs) if word in shared), strict=True
        ):
            if theirs[at] != word:
                return same[at][2:]
    return None
