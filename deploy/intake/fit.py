"""Loads a state_dict into a module, compares shapes, and says what does not fit and what to do about it."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deploy.artifact.tensors import format_shape
from deploy.errors import CheckpointError
from deploy.intake.options import Match
from deploy.intake.pairing import COUNTER, certain, contradiction, is_counter, pair_tensors, place, same_shape, strip, tensors_of

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
    """A tensor with a wrong shape, or of numbers that are no floats. `name` is the module's, `key` the checkpoint's.

    kind: what it holds in place of floats, such as "integers" or "complex64"; "" where the shapes differ.
    """

    name: str
    key: str
    found: tuple[int, ...]
    expected: tuple[int, ...]
    kind: str = ""

    def __str__(self) -> str:
        key = "" if self.key.endswith(self.name) else f" ({self.key})"
        note = f" of {self.kind}" if self.kind else ""
        return f"{self.name}{key} is {format_shape(self.found)}{note}, expected {format_shape(self.expected)}"


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What happened to every tensor. Names are the module's; those in `unexpected` are the checkpoint's without the prefix.

    missing: tensors of the module that the checkpoint lacks; they keep their values.
    unexpected: tensors of the checkpoint that the module does not have.
    stripped, kept: see `Pairing`.
    found_under, others: see StateDict.
    `num_batches_tracked` is in none of the lists, because inference does not read it.
    """

    match: Match
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    stripped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
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
            ("not in the checkpoint kept as they were", self.kept),
            ("of another shape", self.mismatched),
            ("more in the checkpoint not used", self.unexpected),
        ):
            if names:
                parts.append(f"{len(names)} {what} ({_some(names, 3)})")
        return "; ".join(parts)


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    match: Match = "name",
    allow_partial: bool = False,
    fits_with: Callable[[int], bool] = lambda classes: True,
) -> LoadReport:
    """Copy the tensors of `state` into `module`, converted to its floating dtypes.

    By name, after removing the prefixes that make more names match. Or by order, for a checkpoint whose names say nothing:
    every shape must fit, the names must not say otherwise, and tensors after the module's last one are left out and
    reported. With `allow_partial` the tensors that fit are loaded; by order, these are all tensors before the first that
    does not fit. fits_with: whether `state` fits when the module is made for so many classes, asked before an error says so.

    Raises CheckpointError when a tensor is missing, is unexpected or has another shape, when nothing fits, or when names and
    order contradict one another. Some tensors may have been loaded by then.
    """
    pairs, stripped, kept = pair_tensors(module, state, match)
    expected = tensors_of(module)
    mismatched = _mismatched(expected, state, pairs)
    unexpected: tuple[str, ...] = ()
    if match == "order":
        if mismatched:  # after the first mismatch, no place is certain any more
            names = list(pairs)
            pairs = {name: pairs[name] for name in names[: names.index(mismatched[0].name)]}
            mismatched = mismatched[:1]
        _refuse_contradiction(module, state, pairs)
        used = {*pairs.values(), *(mismatch.key for mismatch in mismatched)}
        unexpected = tuple(key for key in state if key not in used and not is_counter(key, state[key]))
    off = {*kept, *(mismatch.name for mismatch in mismatched)}
    fitting = OrderedDict((name, state[key]) for name, key in pairs.items() if name not in off)
    metadata = _metadata(module, state, match, stripped)
    if metadata is not None:
        fitting._metadata = metadata  # type: ignore[attr-defined]  # nn.Module.load_state_dict reads it there
    try:
        # torch decides about names, because a module may translate the names of its older versions.
        result = module.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{place(state)} cannot be loaded into {type(module).__name__}: {' '.join(str(error).split())}"
        ) from error
    missing = tuple(name for name in result.missing_keys if name not in off and not name.endswith(COUNTER))
    unexpected += tuple(name for name in result.unexpected_keys if not name.endswith(COUNTER))
    report = LoadReport(
        match=match,
        loaded=tuple(name for name in expected if name not in off and name not in missing and not name.endswith(COUNTER)),
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
        stripped=stripped,
        kept=kept,
        found_under=getattr(state, "found_under", ""),
        others=getattr(state, "others", ()),
    )
    failed = not report.complete or (bool(report.unexpected) and match == "name")
    if (failed and not allow_partial) or not report.loaded:
        raise CheckpointError(_complaint(module, state, report, fits_with))
    return report


def mismatches(module: nn.Module, state: Mapping[str, Tensor], match: Match = "name") -> tuple[Mismatch, ...]:
    """The tensors of `state` whose counterpart in `module`, by name or by order, has another shape."""
    return _mismatched(tensors_of(module), state, pair_tensors(module, state, match).keys)


def infer_num_classes(module: nn.Module, state: Mapping[str, Tensor], match: Match = "name") -> int | None:
    """The number of classes that `state` was trained for, read from its head.

    The head is where the shapes differ: in one dimension, by the same two sizes in all tensors that differ. If none differ,
    the head is the last tensor with a counterpart. None if the shapes differ in any other way.
    """
    pairs = pair_tensors(module, state, match).keys
    expected = tensors_of(module)
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


def _refuse_contradiction(module: nn.Module, state: Mapping[str, Tensor], pairs: Mapping[str, str]) -> None:
    found = contradiction(tensors_of(module), state, pairs)
    if found is None:
        return
    by_name = f"\nTry: `match` name, by which all {_count(module)} tensors fit" if _all_fit(module, state, "name") else ""
    raise CheckpointError(
        f"{place(state)} does not fit {type(module).__name__} by order: {found[1]} would become {found[0]}, and the names on the"
        f" two sides say that their order is not the same{by_name}"
    )


def _mismatched(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], pairs: Mapping[str, str]) -> tuple[Mismatch, ...]:
    mismatched = []
    for name, key in pairs.items():
        target, tensor = expected.get(name), state[key]
        if target is None or is_lazy(target):
            continue
        fits = same_shape(target, tensor)
        if fits and (not target.is_floating_point() or tensor.is_floating_point()):
            continue
        kind = _kind(tensor) if fits else ""
        mismatched.append(Mismatch(name=name, key=key, found=tuple(tensor.shape), expected=tuple(target.shape), kind=kind))
    return tuple(mismatched)


def _kind(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return "integers" if name.lstrip("u").startswith("int") else name


def _all_fit(module: nn.Module, state: Mapping[str, Tensor], match: Match) -> bool:
    """Whether every tensor of the module has a counterpart of its shape, and by name no tensor is left over."""
    expected = tensors_of(module)
    try:
        pairs, _, kept = pair_tensors(module, state, match)
    except CheckpointError:
        return False
    over = match == "name" and any(name not in expected and not name.endswith(COUNTER) for name in pairs)
    whole = all(name in pairs or name in kept or name.endswith(COUNTER) for name in expected)
    return whole and not over and not _mismatched(expected, state, pairs)


def _count(module: nn.Module) -> int:
    return sum(not name.endswith(COUNTER) for name in tensors_of(module))


def _metadata(module: nn.Module, state: Mapping[str, Tensor], match: Match, stripped: tuple[str, ...]) -> dict[str, Any] | None:
    """Versions of the modules, by the module's names; those of `module` itself if the file format has none."""
    if match == "order" or not getattr(state, "ordered", True):
        current: dict[str, Any] | None = getattr(module.state_dict(), "_metadata", None)
        return current
    kept = getattr(state, "metadata", None) or getattr(state, "_metadata", None)
    return None if kept is None else {strip(f"{name}.", stripped).rstrip("."): value for name, value in kept.items()}


def _some(items: Sequence[object], count: int = _LISTED) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(map(str, items[:count])) + more


def _complaint(module: nn.Module, state: Mapping[str, Tensor], report: LoadReport, fits_with: Callable[[int], bool]) -> str:
    lists: list[tuple[str, Sequence[object]]] = [
        ("missing", report.missing),
        ("unexpected", report.unexpected),
        ("of another shape", [mismatch for mismatch in report.mismatched if not mismatch.kind]),
        ("of another type", [mismatch for mismatch in report.mismatched if mismatch.kind]),
    ]
    counts = ", ".join(f"{len(names)} {what}" for what, names in lists if names)
    taken = f" (prefix {' and '.join(map(repr, report.stripped))} taken off)" if report.stripped else ""
    lines = [f"{place(state)} does not fit {type(module).__name__} by {report.match}: {counts}{taken}"]
    lines += [f"  {what} ({len(names)}): {_some(names)}" for what, names in lists if names]
    advice = _advice(module, state, report, fits_with)
    return "\n".join([*lines, f"Try: {advice}"] if advice else lines)


def _advice(module: nn.Module, state: Mapping[str, Tensor], report: LoadReport, fits_with: Callable[[int], bool]) -> str | None:
    """What was found to work, or None."""
    expected = tensors_of(module)
    names = [name for name in expected if not name.endswith(COUNTER)]
    heads = report.mismatched and not report.missing and not (report.unexpected and report.match == "name")
    classes = infer_num_classes(module, state, report.match) if heads else None
    if classes is not None and report.mismatched[-1].name in names[-2:] and fits_with(classes):
        return f"`num_classes` {classes}, as in the head of the checkpoint"
    if report.complete and report.loaded:
        return "`allow_partial`, which leaves the unexpected out"
    by_order = report.match == "name" and getattr(state, "ordered", True) and _all_fit(module, state, "order")
    ordered = pair_tensors(module, state, "order").keys if by_order else {}
    if by_order and certain(expected, state, ordered) and contradiction(expected, state, ordered) is None:
        return f"`match` order, by which all {len(names)} tensors fit"
    if report.loaded:
        return "the architecture and the arguments that it was trained with, or `allow_partial` to load what fits"
    shapes = {tensor.shape for tensor in state.values()}
    if any(is_lazy(tensor) or tensor.shape in shapes for name, tensor in expected.items() if name in names):
        return None
    return "another architecture, or other arguments of it: no tensor of the checkpoint has a shape of this one's"
