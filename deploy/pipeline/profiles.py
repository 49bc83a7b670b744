"""Optimization profiles: what `--shapes` asks for, completed by what the manifest says."""

from collections.abc import Mapping, Sequence

from deploy.artifact.tensors import Profile, ShapeRange, TensorSpec, default_profile, parse_fixed_shapes
from deploy.errors import UsageError

_EXPECTED = "NAME=MIN:OPT:MAX, such as input=1x3x224x224:8x3x224x224:32x3x224x224"


def parse_range(text: str) -> tuple[str, ShapeRange]:
    """`"input=1x3x224x224:8x3x224x224:32x3x224x224"` -> name and range; one shape alone stands for all three.

    Raises UsageError.
    """
    name, shapes = parse_fixed_shapes(text, what="`shapes`", expected=_EXPECTED, counts=(1, 3))
    low, best, high = shapes if len(shapes) == 3 else shapes * 3
    return name, ShapeRange(min=low, opt=best, max=high)


def make_profiles(texts: Sequence[str], inputs: Sequence[TensorSpec], known: Sequence[Profile]) -> list[Profile]:
    """The profiles that `texts` ask for; those of the manifest, `known`, where there are none. None for static inputs.

    An input that is named again begins the next profile. What a text leaves open is as in the first of `known`. Raises
    UsageError.
    """
    asked: list[dict[str, ShapeRange]] = []
    names = [spec.name for spec in inputs]
    for text in texts:
        name, shapes = parse_range(text)
        if name not in names:
            raise UsageError(f"`shapes`: unknown input {name!r}; expected one of {', '.join(names)}")
        if not asked or name in asked[-1]:
            asked.append({})
        asked[-1][name] = shapes
    if not asked and known:
        return list(known)
    base: Mapping[str, ShapeRange] = known[0] if known else default_profile(inputs) or {}
    return [_complete(each, inputs, base) for each in asked or [{}]]


def _complete(asked: Mapping[str, ShapeRange], inputs: Sequence[TensorSpec], base: Mapping[str, ShapeRange]) -> Profile:
    sizes = _sizes(asked, inputs)
    for spec in inputs:
        if spec.name in base:
            for axis, dim in enumerate(spec.shape):
                if isinstance(dim, str):
                    sizes.setdefault(dim, _sides(base[spec.name], axis))
    for spec in inputs:
        if unknown := [dim for dim in spec.dynamic if dim not in sizes]:
            raise UsageError(f"{spec} is dynamic in {', '.join(unknown)}: say `shapes` {spec.name}=MIN:OPT:MAX")
    low, best, high = ({dim: sides[index] for dim, sides in sizes.items()} for index in range(3))
    return {spec.name: ShapeRange(min=spec.concrete(low), opt=spec.concrete(best), max=spec.concrete(high)) for spec in inputs}


def _sizes(asked: Mapping[str, ShapeRange], inputs: Sequence[TensorSpec]) -> dict[str, tuple[int, int, int]]:
    """Smallest, optimal and largest size of each symbolic dimension that `asked` gives; inputs that share one share its sizes.

    Raises UsageError for a range that does not fit its input, or contradicts that of another.
    """
    sizes: dict[str, tuple[int, int, int]] = {}
    first: dict[str, TensorSpec] = {}
    for spec in inputs:
        if spec.name not in asked:
            continue
        shapes = asked[spec.name]
        _check_range(spec, shapes)
        for axis, dim in enumerate(spec.shape):
            if not isinstance(dim, str):
                continue
            sides = _sides(shapes, axis)
            if sizes.setdefault(dim, sides) != sides:
                other = first[dim]
                raise UsageError(
                    f"`shapes` gives {dim!r} as {_colons(sizes[dim])} in {other.name!r} and {_colons(sides)} in {spec.name!r}, which"
                    f" have the same size there ({other}; {spec}): give them the same, or one of the two"
                )
            first.setdefault(dim, spec)
    return sizes


def _sides(shapes: ShapeRange, axis: int) -> tuple[int, int, int]:
    return shapes.min[axis], shapes.opt[axis], shapes.max[axis]


def _colons(sides: tuple[int, int, int]) -> str:
    return ":".join(map(str, sides))


def _check_range(spec: TensorSpec, shapes: ShapeRange) -> None:
    if len(shapes.opt) != len(spec.shape):
        raise UsageError(f"`shapes` {spec.name}={shapes} has {len(shapes.opt)} dimensions; expected {spec}")
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, int) and {shapes.min[axis], shapes.opt[axis], shapes.max[axis]} != {dim}:
            raise UsageError(f"`shapes` {spec.name}={shapes}: dimension {axis} is fixed to {dim} in {spec}")
