"""Fits a state_dict into a module: by names, without the prefixes of wrappers, or by order; and compares shapes."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deploy.artifact.tensors import format_shape
from deploy.errors import CheckpointError, UsageError
from deploy.intake.options import Match

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""Prefixes of names: of DataParallel and AveragedModel, of torch.compile, and of the usual attribute that holds the net in
a training module."""

INFIXES = (".module.", "._orig_mod.")
"""The same in the middle of names, when a part of the net was wrapped."""

_COUNTER = "num_batches_tracked"
_LISTED = 10


class StateDict(dict[str, Tensor]):
    """Tensors by name, in the order of the file, and their origin.

    found_under: the key that holds them, "" for the whole file; others: keys of other weights in the same file.
    ordered: whether the order is that of the module that was saved (safetensors sorts).
    metadata: versions of the saved modules, which torch needs to read old layouts; None if the file has none.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        path: Path | None = None,
        found_under: str = "",
        others: tuple[str, ...] = (),
        ordered: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.path = path
        self.found_under = found_under
        self.others = others
        self.ordered = ordered
        self.metadata = metadata


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """A tensor with a wrong shape, or integers in place of floats. `name` is the module's, `key` the checkpoint's."""

    name: str
    key: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        key = "" if self.key.endswith(self.name) else f" ({self.key})"
        note = " of integers" if self.found == self.expected else ""
        return f"{self.name}{key} is {format_shape(self.found)}{note}, expected {format_shape(self.expected)}"


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What happened to every tensor. Names are the module's; those in `unexpected` are the checkpoint's without the prefix.

    missing: tensors of the module that the checkpoint lacks; they keep their values.
    unexpected: tensors of the checkpoint that the module does not have.
    stripped: the prefixes that were removed, in order; `.module.` is one in the middle of names.
    found_under, others: see StateDict.
    `num_batches_tracked` is in none of the lists, because inference does not read it.
    """

    match: Match
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    stripped: tuple[str, ...] = ()
    found_under: str = ""
    others: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every tensor of the module was loaded."""
        return not self.missing and not self.mismatched

    def summary(self) -> str:
        """One line: how many tensors were loaded, from which key, and which were not."""
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        parts = [f"{len(self.loaded)} of {total} tensors loaded by {self.match}"]
        if self.found_under:
            beside = f" ({', '.join(map(repr, self.others))} not used)" if self.others else ""
            parts.append(f"from {self.found_under!r}{beside}")
        if self.stripped:
            parts.append(f"prefix {' and '.join(map(repr, self.stripped))} taken off")
        for what, names in (
            ("missing", self.missing),
            ("of another shape", self.mismatched),
            ("more in the checkpoint not used", self.unexpected),
        ):
            if names:
                parts.append(f"{len(names)} {what} ({_some(names, 3)})")
        return "; ".join(parts)


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], *, match: Match = "name", allow_partial: bool = False
) -> LoadReport:
    """Copy the tensors of `state` into `module`, converted to its floating dtypes.

    By name, after removing those of `PREFIXES` that make more names match. Or by order, for a checkpoint with other names:
    every shape must fit, and tensors after the module's last one are left out and reported. With `allow_partial` the
    tensors that fit are loaded; by order, these are all tensors before the first that does not fit.

    Raises CheckpointError when a tensor is missing, is unexpected or has another shape, or when nothing fits. Some tensors
    may have been loaded by then.
    """
    pairs, stripped = _pairs(module, state, match)
    expected = _tensors(module)
    mismatched = _mismatched(expected, state, pairs)
    unexpected: tuple[str, ...] = ()
    if match == "order":
        if mismatched:  # after the first mismatch, no place is certain any more
            names = list(pairs)
            pairs = {name: pairs[name] for name in names[: names.index(mismatched[0].name)]}
            mismatched = mismatched[:1]
        used = {*pairs.values(), *(mismatch.key for mismatch in mismatched)}
        unexpected = tuple(key for key in state if key not in used and not key.endswith(_COUNTER))
    off = {mismatch.name for mismatch in mismatched}
    fitting = OrderedDict((name, state[key]) for name, key in pairs.items() if name not in off)
    metadata = _metadata(module, state, match, stripped)
    if metadata is not None:
        fitting._metadata = metadata  # type: ignore[attr-defined]  # nn.Module.load_state_dict reads it there
    try:
        # torch decides about names, because a module may translate the names of its older versions.
        result = module.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{_place(state)} cannot be loaded into {type(module).__name__}: {error}") from error
    missing = tuple(name for name in result.missing_keys if name not in off and not name.endswith(_COUNTER))
    unexpected += tuple(name for name in result.unexpected_keys if not name.endswith(_COUNTER))
    report = LoadReport(
        match=match,
        loaded=tuple(name for name in expected if name not in off and name not in missing and not name.endswith(_COUNTER)),
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
        stripped=stripped,
        found_under=getattr(state, "found_under", ""),
        others=getattr(state, "others", ()),
    )
    failed = not report.complete or (bool(report.unexpected) and match == "name")
    if (failed and not allow_partial) or not report.loaded:
        raise CheckpointError(_complaint(module, state, report))
    return report


def mismatches(module: nn.Module, state: Mapping[str, Tensor], match: Match = "name") -> tuple[Mismatch, ...]:
    """The tensors of `state` whose counterpart in `module`, by name or by order, has another shape."""
    return _mismatched(_tensors(module), state, _pairs(module, state, match)[0])


def infer_num_classes(module: nn.Module, state: Mapping[str, Tensor], match: Match = "name") -> int | None:
    """The number of classes that `state` was trained for, read from its head.

    The head is where the shapes differ: in one dimension, by the same two sizes in all tensors that differ. If none differ,
    the head is the last tensor with a counterpart. None if the shapes differ in any other way.
    """
    pairs, _ = _pairs(module, state, match)
    expected = _tensors(module)
    sizes = set()
    for mismatch in _mismatched(expected, state, pairs):
        if len(mismatch.found) != len(mismatch.expected):
            return None
        differ = [pair for pair in zip(mismatch.expected, mismatch.found, strict=True) if pair[0] != pair[1]]
        sizes.add(differ[0] if len(differ) == 1 else None)
    if len(sizes) > 1 or None in sizes:
        return None
    for pair in sizes:
        return pair[1] if pair else None
    last = [key for name, key in pairs.items() if name in expected and state[key].dim()]
    return state[last[-1]].shape[0] if last else None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _pairs(module: nn.Module, state: Mapping[str, Tensor], match: Match) -> tuple[dict[str, str], tuple[str, ...]]:
    """The checkpoint's keys by name (the module's names, and others that it does not have), and the removed prefixes."""
    expected = _tensors(module)
    if match == "order":
        if not getattr(state, "ordered", True):
            raise CheckpointError(
                f"{_place(state)} cannot be matched by order: safetensors sorts its tensors; rename them, or give the file that"
                " torch.save wrote"
            )
        names, keys = ([name for name in names if not name.endswith(_COUNTER)] for names in (expected, state))
        return dict(zip(names, keys, strict=False)), ()
    if match != "name":
        raise UsageError(f"unknown match {match!r}; expected name or order")
    stripped = _best_prefixes(state, set(expected))
    return {_strip(key, stripped): key for key in state}, stripped


def _best_prefixes(keys: Iterable[str], expected: set[str]) -> tuple[str, ...]:
    """The fewest prefixes whose removal makes the most names match."""
    best: tuple[str, ...] = ()
    most = len(expected.intersection(keys))
    level: dict[tuple[str, ...], tuple[str, ...]] = {tuple(keys): ()}
    while level and most < len(expected):
        deeper: dict[tuple[str, ...], tuple[str, ...]] = {}
        for names, taken in level.items():
            for prefix in (*PREFIXES, *INFIXES):
                shorter = tuple(_strip(name, (prefix,)) for name in names)
                if shorter != names and len(set(shorter)) == len(names):
                    deeper.setdefault(shorter, (*taken, prefix))
        for names, taken in deeper.items():
            if (count := len(expected.intersection(names))) > most:
                best, most = taken, count
        level = deeper if len(deeper) < 1000 else {}
    return best


def _strip(name: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        name = name.replace(prefix, ".") if prefix.startswith(".") else name.removeprefix(prefix)
    return name


def _mismatched(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], pairs: Mapping[str, str]) -> tuple[Mismatch, ...]:
    mismatched = []
    for name, key in pairs.items():
        target, tensor = expected.get(name), state[key]
        if target is None or is_lazy(target):
            continue
        if target.dim() == 0 and tensor.shape == (1,):
            continue  # torch 0.3 saved scalars this way
        if tensor.shape != target.shape or (target.is_floating_point() and not tensor.is_floating_point()):
            mismatched.append(Mismatch(name=name, key=key, found=tuple(tensor.shape), expected=tuple(target.shape)))
    return tuple(mismatched)


def _metadata(module: nn.Module, state: Mapping[str, Tensor], match: Match, stripped: tuple[str, ...]) -> dict[str, Any] | None:
    """Versions of the modules, by the module's names; those of `module` itself if the file format has none."""
    if match == "order" or not getattr(state, "ordered", True):
        current: dict[str, Any] | None = getattr(module.state_dict(), "_metadata", None)
        return current
    kept = getattr(state, "metadata", None) or getattr(state, "_metadata", None)
    return None if kept is None else {_strip(f"{name}.", stripped).rstrip("."): value for name, value in kept.items()}


def _place(state: Mapping[str, Tensor]) -> str:
    path = getattr(state, "path", None)
    key = getattr(state, "found_under", "")
    return f"{path or 'the checkpoint'}{f' ({key!r})' if key else ''}"


def _some(items: Sequence[object], count: int = _LISTED) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(map(str, items[:count])) + more


def _complaint(module: nn.Module, state: Mapping[str, Tensor], report: LoadReport) -> str:
    lists: list[tuple[str, Sequence[object]]] = [
        ("missing", report.missing),
        ("unexpected", report.unexpected),
        ("of another shape", report.mismatched),
    ]
    counts = ", ".join(f"{len(names)} {what}" for what, names in lists if names)
    taken = f" (prefix {' and '.join(map(repr, report.stripped))} taken off)" if report.stripped else ""
    lines = [f"{_place(state)} does not fit {type(module).__name__} by {report.match}: {counts}{taken}"]
    lines += [f"  {what} ({len(names)}): {_some(names)}" for what, names in lists if names]
    lines.append(f"Try: {_advice(module, state, report)}")
    return "\n".join(lines)


def _advice(module: nn.Module, state: Mapping[str, Tensor], report: LoadReport) -> str:
    names = [name for name in _tensors(module) if not name.endswith(_COUNTER)]
    classes = infer_num_classes(module, state, report.match) if report.mismatched and not report.missing else None
    if classes is not None and report.mismatched[-1].name in names[-2:]:
        return f"`num_classes` {classes}, as in the head of the checkpoint"
    if report.complete:
        return "`allow_partial`, which leaves the unexpected out, or the architecture that has them"
    if report.match == "name" and getattr(state, "ordered", True):
        pairs, _ = _pairs(module, state, "order")
        if len(pairs) == len(names) and not _mismatched(_tensors(module), state, pairs):
            return f"`match` order, by which all {len(names)} tensors fit"
    if not report.loaded:
        return "another architecture: nothing of this one is in the checkpoint"
    return "the architecture and the arguments that it was trained with, or `allow_partial` to load what fits"
