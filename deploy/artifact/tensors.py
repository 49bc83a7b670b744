"""The inputs and outputs of a model: names, dtypes and shapes, feeds, and the range of shapes of an engine."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from string import ascii_uppercase
from typing import Any

import numpy as np

from deploy.errors import InputError, UsageError
from deploy.evidence.parity import PARITY_BATCHES

Feed = dict[str, np.ndarray]
"""The inputs of a model, or its outputs, by name."""

Dim = int | str

DTYPES = (
    "float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip

DEFAULT_BATCH = (1, 8, 32)
"""The batch sizes (min, opt, max) of the default profile of an engine."""

EXAMPLE_BATCH = 2
"""The batch size of the example input of an export: torch.export would make a dimension of size 1 static."""

_MASK = re.compile(r"mask", re.IGNORECASE)

_BATCH = re.compile(r"batch(_?size)?|n|b|bs", re.IGNORECASE)
"""What the batch is called."""

_READABLE = 20
"""Characters that an expression for a dimension may have in messages and summaries."""

# The sizes of symbolic dimensions other than the batch during an export, in order of appearance: all different, so that the
# exporter cannot confuse two dimensions, and multiples of 32, which encoder-decoders need.
_EXAMPLE_SIZES = (224, 192, 160, 128, 96)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output: its name, its dtype (a numpy name, or `bfloat16`) and its shape.

    A dimension is a positive int or the name of a symbolic dimension. The same name means the same size in all tensors.

    bounds: made-up input is drawn from `[low, high)`, such as the rows of the table that an integer input is looked up in;
        None where nothing is known. Input that is given may be anything.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bounds is not None and not (self.bounds[0] < self.bounds[1] and all(map(math.isfinite, self.bounds))):
            raise UsageError(f"{self.name!r} has the range {list(self.bounds)}; expected [LOW,HIGH] with LOW below HIGH")
        if self.dtype not in DTYPES:
            raise UsageError(f"{self.name!r} has dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        for dim in self.shape:
            if isinstance(dim, int) and dim < 1:
                raise UsageError(f"{self.name!r} has a dimension of {dim} in {format_shape(self.shape)}; expected 1 or more")

    @property
    def dynamic(self) -> tuple[str, ...]:
        """The names of the symbolic dimensions, in order, without repetition."""
        return tuple(dict.fromkeys(dim for dim in self.shape if isinstance(dim, str)))

    def __str__(self) -> str:
        return format_specs([self])

    def check(self, dtype: str, shape: Sequence[int], dims: dict[str, int]) -> None:
        """Compare a dtype and a shape with this spec, and add the sizes of symbolic dimensions to `dims`.

        Raises InputError if they differ, or if a symbolic dimension has another size than in `dims`.
        """
        if dtype != self.dtype:
            raise InputError(f"{self.name!r} is {dtype}; expected {self}")
        if len(shape) != len(self.shape):
            raise InputError(f"{self.name!r} has {len(shape)} dimensions {format_shape(shape)}; expected {self}")
        for size, dim in zip(shape, self.shape, strict=True):
            if isinstance(dim, int):
                if size != dim:
                    raise InputError(f"{self.name!r} has shape {format_shape(shape)}; expected {self}")
            elif size < 1:
                raise InputError(f"{self.name!r} has shape {format_shape(shape)}: {self._short(dim)!r} must be 1 or more")
            elif dims.setdefault(dim, size) != size:
                raise InputError(
                    f"{self.name!r} has shape {format_shape(shape)}: {self._short(dim)!r} is {size} here and {dims[dim]} in"
                    " another input"
                )

    def concrete(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with the sizes in `dims` for symbolic dimensions. Raises UsageError for a dimension that `dims` lacks."""
        missing = [dim for dim in self.dynamic if dim not in dims]
        if missing:
            raise UsageError(f"{self} needs a size for {', '.join(repr(self._short(dim)) for dim in missing)}")
        return tuple(dim if isinstance(dim, int) else dims[dim] for dim in self.shape)

    def _short(self, dim: str) -> str:
        """The dimension as `str(self)` shows it."""
        return dim_letters([self.shape]).get(dim, dim)


@dataclass(frozen=True, kw_only=True)
class ShapeRange:
    """The smallest, optimal and largest shape of one input of an engine."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise UsageError(f"the shapes of {self} differ in rank")
        if not all(1 <= low <= best <= high for low, best, high in zip(self.min, self.opt, self.max, strict=True)):
            raise UsageError(f"expected 1 <= MIN <= OPT <= MAX in every dimension of {self}")

    def __str__(self) -> str:
        return ":".join(format_shape(shape) for shape in (self.min, self.opt, self.max))


Profile = dict[str, ShapeRange]
"""The shape range of every input, by name."""


def batch_dim(specs: Sequence[TensorSpec]) -> str | None:
    """The name of the symbolic batch; None where no input begins with a symbolic dimension.

    It is the first dimension of the first input that begins with a symbolic one, unless that is not called like a batch
    (`batch...`, `N`, `B`) and another dimension is: of `TxNx6`, time first, the batch is `N`, and rows are not requests.
    """
    first = next((spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], str)), None)
    if first is None or _BATCH.fullmatch(first):
        return first
    return next((dim for spec in specs for dim in spec.dynamic if _BATCH.fullmatch(dim)), first)


def batch_range(specs: Sequence[TensorSpec], profile: Profile) -> tuple[int, int] | None:
    """The least and the largest batch that a profile takes; None where the batch is not symbolic, or the profile does not say."""
    batch = batch_dim(specs)
    for spec in specs:
        if batch is not None and batch in spec.shape and spec.name in profile:
            axis = spec.shape.index(batch)
            return profile[spec.name].min[axis], profile[spec.name].max[axis]
    return None


def batched(specs: Sequence[TensorSpec]) -> bool:
    """Whether every tensor begins with the symbolic batch, so that feeds can be cut and joined by rows."""
    batch = batch_dim(specs)
    return batch is not None and all(spec.shape and spec.shape[0] == batch for spec in specs)


def rows_join(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether feeds can be concatenated, and their results split: all tensors must begin with the symbolic batch."""
    return batch_dim(inputs) is not None and batched([*inputs, *outputs])


def default_profile(specs: Sequence[TensorSpec]) -> Profile | None:
    """The profile with the batch sizes `DEFAULT_BATCH`; None if a dimension other than the batch is symbolic."""
    batch = batch_dim(specs)
    if any(dim != batch for spec in specs for dim in spec.dynamic):
        return None
    low, best, high = DEFAULT_BATCH
    return {
        spec.name: ShapeRange(
            min=spec.concrete({batch: low} if batch else {}),
            opt=spec.concrete({batch: best} if batch else {}),
            max=spec.concrete({batch: high} if batch else {}),
        )
        for spec in specs
    }


def default_dims(
    specs: Sequence[TensorSpec],
    profiles: Sequence[Profile],
    image: tuple[int, ...] | None = None,
    *,
    known: Mapping[str, int],
    remedy: str,
) -> dict[str, int]:
    """A size for every symbolic dimension: from `known`, else the optimum of the first profile, else from `image`.

    image: the shape of a preprocessed image without the batch, used if the model has one input of that rank.
    If none of them has a size, the batch is 1, as is another first dimension unless the batch is in that input too; for any
    other, a UsageError that ends with `remedy` is raised.
    """
    sizes = dict(known)
    batch = batch_dim(specs)
    for spec in specs:
        sources = [profiles[0][spec.name].opt] if profiles else []
        if image is not None and len(specs) == 1 and len(spec.shape) == len(image) + 1:
            sources.append((1, *image))
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str) and dim not in sizes:
                one = dim == batch or (axis == 0 and batch not in spec.shape)
                size = next((source[axis] for source in sources if axis < len(source)), 1 if one else None)
                if size is None:
                    raise UsageError(
                        f"{spec}: neither a profile nor a crop in the preprocessing gives {spec._short(dim)!r} a size: {remedy}"
                    )
                sizes[dim] = size
    return sizes


def parse_shape(text: str) -> tuple[Dim, ...]:
    """`"1x3xHxW"` -> `(1, 3, "H", "W")`. Raises UsageError."""
    dims: list[Dim] = []
    for part in text.split("x"):
        if part.isdecimal() and int(part) > 0:
            dims.append(int(part))
        elif part.isidentifier():
            dims.append(part)
        else:
            raise UsageError(f"cannot read the shape {text!r}: {part!r} is neither a positive number nor a name")
    return tuple(dims)


def parse_shapes(text: str, *, what: str, expected: str, counts: Sequence[int] = (1,)) -> tuple[str, tuple[tuple[Dim, ...], ...]]:
    """`"x=1x3:8x3:32x3"` -> `("x", ((1, 3), (8, 3), (32, 3)))`: a name, and the shapes after it with colons between them.

    counts: how many shapes there may be. what, expected: words for the error. Raises UsageError.
    """
    name, _, rest = text.partition("=")
    parts = rest.split(":")
    if not name or not all(parts) or len(parts) not in counts:
        raise UsageError(f"cannot read {what} {text!r}; expected {expected}")
    return name, tuple(parse_shape(part) for part in parts)


def parse_fixed_shapes(
    text: str, *, what: str, expected: str, counts: Sequence[int] = (1,)
) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """As `parse_shapes`, for shapes of numbers only."""
    name, shapes = parse_shapes(text, what=what, expected=expected, counts=counts)
    fixed = tuple(tuple(dim for dim in shape if isinstance(dim, int)) for shape in shapes)
    if fixed != shapes:
        raise UsageError(f"{what} {text!r} must be numbers; expected {expected}")
    return name, fixed


def format_shape(shape: Sequence[Dim]) -> str:
    """`(1, 3, "H", "W")` -> `"1x3xHxW"`; a scalar is `"scalar"`. Long expressions are shown as letters: see `dim_letters`."""
    return _format_shape(shape, dim_letters([shape]))


def format_specs(specs: Sequence[TensorSpec], separator: str = ", ") -> str:
    """`x: float32 batchx3xHxW, y: int64 batch`; a letter stands for the same long expression in all the specs."""
    letters = dim_letters([spec.shape for spec in specs])
    return separator.join(f"{spec.name}: {spec.dtype} {_format_shape(spec.shape, letters)}" for spec in specs)


def dim_letters(shapes: Iterable[Sequence[Dim]]) -> dict[str, str]:
    """A letter, or a letter and a number, for every dimension that is a long expression, `floor(floor(H/2 - 1/2)/2) + 1`.

    The export of a module that pools or strides makes expressions of hundreds of characters. No letter is the name of a
    dimension, alone or in an expression. The manifest has the expressions in full.
    """
    dims = list(dict.fromkeys(dim for shape in shapes for dim in shape if isinstance(dim, str)))
    names = {name for dim in dims for name in re.findall(r"[A-Za-z_]\w*", dim)}
    letters = (f"{letter}{number or ''}" for number in count() for letter in ascii_uppercase)
    free = (letter for letter in letters if letter not in names)
    return {dim: next(free) for dim in dims if len(dim) > _READABLE and not dim.isidentifier()}


def _format_shape(shape: Sequence[Dim], letters: Mapping[str, str]) -> str:
    return "x".join(letters.get(dim, dim) if isinstance(dim, str) else str(dim) for dim in shape) or "scalar"


def example_dims(specs: Sequence[TensorSpec], batch: str | None) -> dict[str, int]:
    """Sizes of all symbolic dimensions for the example input of an export and for parity on random input."""
    others = [dim for dim in dict.fromkeys(dim for spec in specs for dim in spec.dynamic) if dim != batch]
    sizes = {dim: _EXAMPLE_SIZES[index % len(_EXAMPLE_SIZES)] for index, dim in enumerate(others)}
    return sizes | ({batch: EXAMPLE_BATCH} if batch else {})


def random_feed(specs: Sequence[TensorSpec], dims: Mapping[str, int], seed: int = 0) -> Feed:
    """Random arrays for `specs`: standard normal floats, integers from 0 to 9, booleans with equal chances.

    Where a spec has bounds, its numbers are spread evenly between them. Integers and booleans whose name says that they are
    a mask are 0 or 1, and 1 first in every row: a row that is masked out whole has no answer.
    `dims` has the size of every symbolic dimension. `bfloat16` inputs are float32 arrays, because numpy has no bfloat16.
    """
    rng = np.random.default_rng(seed)
    feed: Feed = {}
    for spec in specs:
        shape = spec.concrete(dims)
        dtype = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
        if spec.bounds is not None:
            feed[spec.name] = _between(rng, *spec.bounds, shape, dtype)
        elif dtype.kind == "f":
            feed[spec.name] = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        elif dtype.kind == "b" or _MASK.search(spec.name):
            feed[spec.name] = (rng.random(shape) < 0.5).astype(dtype)
        else:
            feed[spec.name] = rng.integers(0, 10, shape).astype(dtype)
        if spec.bounds is None and dtype.kind in "biu" and shape and _MASK.search(spec.name):
            feed[spec.name][..., 0] = 1
    return feed


def _between(rng: np.random.Generator, low: float, high: float, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    if dtype.kind == "f":
        return rng.uniform(low, high, shape).astype(dtype)
    return rng.integers(math.ceil(low), max(math.ceil(high), math.ceil(low) + 1), shape).astype(dtype)


def random_feeds(specs: Sequence[TensorSpec], dims: Mapping[str, int]) -> list[Feed]:
    """Random feeds with the batch sizes `PARITY_BATCHES`; if the batch is fixed, as many feeds with different seeds.

    `dims` has the size of every other symbolic dimension.
    """
    batch = batch_dim(specs)
    return [
        random_feed(specs, {**dims, batch: size} if batch else dims, seed=seed)
        for seed, size in enumerate(PARITY_BATCHES, start=1)
    ]


def odd_sizes(specs: Sequence[TensorSpec], dims: Mapping[str, int], profile: Profile | None = None) -> dict[str, int] | None:
    """Other sizes than `dims` for the dynamic dimensions beside the batch: odd ones, within `profile`; None where there are none.

    What is right at the sizes of an example alone is found out by them.
    """
    batch = batch_dim(specs)
    sizes: dict[str, int] = {}
    for spec in specs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str) and dim != batch and dim not in sizes:
                low, high = 1, dims[dim]
                if profile and spec.name in profile:
                    low, high = profile[spec.name].min[axis], profile[spec.name].max[axis]
                size = min(max(dims[dim] * 5 // 8 | 1, low), high)
                sizes[dim] = size if size != dims[dim] else low
    return {**dims, **sizes} if any(size != dims[dim] for dim, size in sizes.items()) else None


def other_sizes(specs: Sequence[TensorSpec], dims: Mapping[str, int], profile: Profile | None = None) -> list[dict[str, int]]:
    """Sizes to try beside `dims`: `odd_sizes`, and for networks that take multiples of 32 only, 32 more. Empty where none differ."""
    odd = odd_sizes(specs, dims, profile)
    if odd is None:
        return []
    more = {dim: size + 32 if odd[dim] != size else size for dim, size in dims.items()}
    return [odd] if profile else [odd, more]


def dynamic_sizes(specs: Sequence[TensorSpec], feed: Feed) -> dict[str, int]:
    """The sizes in `feed` of the dynamic dimensions other than the batch."""
    batch = batch_dim(specs)
    return {
        dim: size
        for spec in specs
        for dim, size in zip(spec.shape, feed[spec.name].shape, strict=True)
        if isinstance(dim, str) and dim != batch
    }


def row_count(feed: Feed) -> int:
    """The rows of a feed: the first dimension of its first array, 1 for a scalar or a model without inputs."""
    first = next(iter(feed.values()), None)
    return len(first) if first is not None and first.ndim else 1


def size_of_batch(specs: Sequence[TensorSpec], feed: Feed) -> int:
    """The size in `feed` of the symbolic batch, wherever it stands; its rows where there is none."""
    batch = batch_dim(specs)
    sizes = (int(feed[spec.name].shape[spec.shape.index(batch)]) for spec in specs if batch is not None and batch in spec.shape)
    return next(sizes, row_count(feed))


def slice_rows(feed: Feed, start: int, stop: int) -> Feed:
    """The rows `start` to `stop` of every array, as views."""
    return {name: array[start:stop] for name, array in feed.items()}
