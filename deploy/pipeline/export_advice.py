"""What to do where the eager module does not run an input: said only where it was tried, and holds."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from deploy.artifact.tensors import TensorSpec, batch_dim, dynamic_sizes, random_feed, size_of_batch
from deploy.intake.call import bind

_OF_INPUT = re.compile(r"\b(sizes?|shapes?|dimensions?|dims?|channels?|dtypes?|scalar types?|(?<!un)expected)\b", re.IGNORECASE)
"""In the error of a tensor that another was expected for."""

_SMALLEST = 4


def run_raw(module: torch.nn.Module, specs: Sequence[TensorSpec], feed: Mapping[str, np.ndarray]) -> object:
    """What `module` makes of `feed`, which stays as it is. Raises what the module raises, and what `bind` does."""
    with torch.inference_mode():
        args, kwargs = bind(module, {spec.name: torch.from_numpy(feed[spec.name].copy()) for spec in specs})
        return module(*args, **kwargs)


def runs(module: torch.nn.Module, specs: Sequence[TensorSpec], feed: Mapping[str, np.ndarray]) -> bool:
    """Whether `module` runs `feed`."""
    try:
        run_raw(module, specs, feed)
    except Exception:  # the user's own code: any error may come
        return False
    return True


def repeated(specs: Sequence[TensorSpec], feed: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """`rows` rows of `feed` along its batch, repeated where it has fewer; inputs without the batch as they are."""
    batch = batch_dim(specs)
    axes = {spec.name: spec.shape.index(batch) for spec in specs if batch in spec.shape}
    return {
        name: np.take(array, np.arange(rows) % array.shape[axes[name]], axis=axes[name]) if name in axes else array
        for name, array in feed.items()
    }


def advice(module: torch.nn.Module, specs: Sequence[TensorSpec], feed: Mapping[str, np.ndarray], error: Exception) -> str:
    """The second line about an `error` on `feed`, with the line feed before it; "" where nothing is known to help."""
    if needed := _not_given(module, specs):
        return f"\nits forward needs {', '.join(needed)} too: give each with `inputs`, in the order of its parameters"
    integers = [name for name, array in feed.items() if array.dtype.kind in "iu"]
    for names in ([[name] for name in integers] if len(integers) > 1 else []) + [integers]:
        if names and runs(module, specs, _zeros(feed, names)):
            return (
                f"\nit runs where {' and '.join(names)} {'are' if len(names) > 1 else 'is'} 0: say the range of the integers,"
                " NAME=1x6:int64[0,100], or give feeds with `data`"
            )
    low = _zeros(feed, integers)
    if sizes := _smaller(module, specs, feed):
        shown = " and ".join(f"{dim} {size}" for dim, size in sizes.items())
        return (
            f"\nit runs with {shown}: give a number in place of {' and '.join(sizes)} with `inputs`, or feeds of sizes that it"
            " takes with `data`"
        )
    for spec in specs:
        other = "int64" if feed[spec.name].dtype.kind == "f" else "float32"
        if runs(
            module,
            [replace(spec, dtype=other) if each is spec else each for each in specs],
            low | {spec.name: low[spec.name].astype(other)},
        ):
            return f"\nit runs where {spec.name} is {other}: say so with `inputs`, {spec.name}=SHAPE:{other}"
    if isinstance(error, (RuntimeError, ValueError, TypeError)) and _OF_INPUT.search(str(error)):
        return "\nif it takes another shape or dtype, say so with `inputs` NAME=1x3x224x224[:dtype]"
    return ""


def _not_given(module: torch.nn.Module, specs: Sequence[TensorSpec]) -> list[str]:
    """Parameters of `forward` without a default that no input is bound to."""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # written in C
        return []
    args, kwargs = bind(module, {spec.name: spec for spec in specs})
    given = signature.bind_partial(*args, **kwargs).arguments
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        each.name
        for each in signature.parameters.values()
        if each.name not in given and each.default is inspect.Parameter.empty and each.kind not in variable
    ]


def _zeros(feed: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """`feed` with 0, which is in every table, for the integers of these names."""
    return {name: np.zeros_like(array) if name in names else array for name, array in feed.items()}


def _smaller(module: torch.nn.Module, specs: Sequence[TensorSpec], feed: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Sizes below those in `feed` that the module runs, for the dynamic dimensions other than the batch; empty where none is found.

    They are halved together until it does; a dimension that is the only one is then as large as it takes. Integers are 0.
    """
    first = dynamic_sizes(specs, dict(feed))
    batch = batch_dim(specs)
    rows = {} if batch is None else {batch: size_of_batch(specs, dict(feed))}
    integers = [name for name, array in feed.items() if array.dtype.kind in "iu"]

    def fits(sizes: Mapping[str, int]) -> bool:
        return runs(module, specs, _zeros(random_feed(specs, {**sizes, **rows}), integers))

    factor = 2
    while first and max(first.values()) // factor >= _SMALLEST:
        sizes = {dim: max(size // factor, 1) for dim, size in first.items()}
        if fits(sizes):
            for dim, size in sizes.items() if len(sizes) == 1 else ():
                low, high = size, 2 * size  # fits, and does not
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if fits({dim: middle}) else (low, middle)
                return {dim: low}
            return sizes
        factor *= 2
    return {}
