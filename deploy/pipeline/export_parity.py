"""What the eager module makes of feeds, and whether a comparison with it can prove anything."""

import copy
import dataclasses
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import Feed, TensorSpec, batch_dim, example_dims, other_sizes, random_feed, size_of_batch
from deploy.errors import DeployError, ExportError
from deploy.evidence.parity import TOLERANCES, judge
from deploy.intake.call import bind
from deploy.intake.export_errors import fixed_reason, line_of
from deploy.intake.exporter import flatten_outputs
from deploy.intake.lookups import Lookups
from deploy.pipeline.export_advice import advice, repeated, run_raw, runs
from deploy.pipeline.written import Case

REAL_ROWS = 8
"""Images that parity is checked on, in one batch or the model's own; of `.npz` files, as many files."""


def run_eager(
    module: torch.nn.Module,
    specs: Sequence[TensorSpec],
    feed: Mapping[str, np.ndarray],
    user_files: Sequence[str],
    ran: Mapping[str, np.ndarray] | None = None,
) -> Feed:
    """The eager module's outputs, flattened. `ran` is a feed that it could run, of another batch size. `feed` stays as it is.

    Raises ExportError, with the module's own error and its line in the user's own file, when it cannot run the input.
    """
    try:
        results = flatten_outputs(run_raw(module, specs, feed))
        return {name: tensor.numpy().copy() for name, tensor in results.items()}  # it may be an input, or a buffer of its own
    except DeployError:
        raise
    except Exception as error:  # the user's own code: any error may come
        shapes = _shapes(feed)
        reason = repr(error) if isinstance(error, KeyError) else next(iter(str(error).strip().splitlines()), repr(error))
        line = line_of(error, user_files)
        name, where = type(module).__name__, f": {line}" if line else ""
        batch = batch_dim(specs)
        if ran is not None and batch is not None and _shapes(ran) != shapes:
            rows = repeated(specs, ran, size_of_batch(specs, dict(feed)))
            if not runs(module, specs, rows):
                fixed, remedy = fixed_reason([batch], static=True)
                raise ExportError(
                    f"{name} cannot be exported{where}: {fixed}: it runs {_shapes(ran)}, and not {shapes}: {reason}\n{remedy}"
                ) from error
        raise ExportError(f"{name} cannot run {shapes}{where}: {reason}{advice(module, specs, feed, error)}") from error


def _shapes(feed: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in feed.items())


def check_repeatable(
    module: torch.nn.Module, specs: Sequence[TensorSpec], feed: Feed, first: Feed, user_files: Sequence[str]
) -> None:
    """Raise ExportError, naming the submodule, where the module gives another result than `first` for the same feed."""
    again = run_eager(module, specs, feed, user_files)
    _, wrong = judge(again, first, TOLERANCES["fp32"], data="the same", batch=0)
    if not wrong:
        return
    culprit = _first_that_differs(module, specs, feed, user_files)
    raise ExportError(
        f"{type(module).__name__} gives another result each time it is run{culprit}, so that nothing can be compared with it"
        f"{_why_it_differs(module, specs, feed)}"
    )


def _why_it_differs(module: torch.nn.Module, specs: Sequence[TensorSpec], feed: Feed) -> str:
    """Whether random numbers or what the module keeps from run to run make its results differ; "" where neither is found to.

    With the seeds of all global generators the same, random results are; two copies of a module keep the same.
    """

    def same(*modules: torch.nn.Module) -> bool:
        found = []
        for each in modules:
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            found.append(list(flatten_outputs(run_raw(each, specs, feed)).values()))
        return _equal(*found)

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        if same(module, module):
            return ": take the random part out (dropout without training=self.training, torch.rand...)"
        kept = same(copy.deepcopy(module), copy.deepcopy(module))
    except Exception:  # what cannot be copied, or runs no third time
        return ""
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
    return (
        "\nits forward changes what the module holds (a counter, a buffer, a cache): let it take that as an input and return it as an output"
        if kept
        else ""
    )


def _first_that_differs(module: torch.nn.Module, specs: Sequence[TensorSpec], feed: Feed, user_files: Sequence[str]) -> str:
    """`, first in 'drop' (Dropout)`: the first submodule whose output differs although its input does not."""
    runs: list[list[tuple[str, str, list[torch.Tensor], list[torch.Tensor]]]] = []
    for _ in range(2):
        seen: list[tuple[str, str, list[torch.Tensor], list[torch.Tensor]]] = []

        def hook(inner: torch.nn.Module, args: object, result: object, *, name: str, seen=seen) -> None:  # type: ignore[no-untyped-def]
            seen.append((name, type(inner).__name__, _tensors(args), _tensors(result)))

        handles = [
            inner.register_forward_hook(lambda m, a, r, name=name: hook(m, a, r, name=name))
            for name, inner in module.named_modules()
            if name
        ]
        try:
            run_eager(module, specs, feed, user_files)
        finally:
            for handle in handles:
                handle.remove()
        runs.append(seen)
    for (name, kind, inputs, results), (_, _, other_inputs, other_results) in zip(*runs, strict=False):
        if _equal(inputs, other_inputs) and not _equal(results, other_results):
            return f", first in {name!r} ({kind})"
    return ""


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in zip(first, second, strict=True)
    )


def other_size(
    module: torch.nn.Module, specs: Sequence[TensorSpec], outputs: Sequence[str], user_files: Sequence[str]
) -> tuple[Case | None, str]:
    """The module at other sizes of the dynamic dimensions beside the batch, and the sizes if there are any to try.

    Odd sizes first; where the module cannot run them, multiples of 32. No case where it runs neither.
    """
    dims = example_dims(specs, batch_dim(specs))
    tried = other_sizes(specs, dims)
    for sizes in tried:
        feed = random_feed(specs, sizes, seed=len(sizes))
        if not runs(module, specs, feed):
            continue
        results = run_eager(module, specs, feed, user_files)
        return Case("random", feed, dict(zip(outputs, results.values(), strict=True))), ""
    return None, ", ".join(f"{dim} {size}" for dim, size in dims.items() if tried and tried[0][dim] != size)


def integer_bounds(
    module: torch.nn.Module, specs: Sequence[TensorSpec], dims: Mapping[str, int]
) -> dict[str, tuple[float, float]]:
    """The rows of the table for every integer input that is looked up as it is, by name.

    Found by running the module on zeros, which are in every table.
    """
    integers = [spec.name for spec in specs if spec.dtype.startswith(("int", "uint"))]
    if not integers:
        return {}
    zeros = {spec.name: torch.zeros(spec.concrete(dims), dtype=getattr(torch, spec.dtype)) for spec in specs}
    args, kwargs = bind(module, zeros)
    lookups = Lookups({name: zeros[name] for name in integers})
    try:
        with torch.inference_mode(), lookups:
            module(*args, **kwargs)
    except Exception:  # noqa: S110  # zeros may be no input; the run on the feeds says what is wrong
        pass
    return {name: (0.0, float(rows)) for name, rows in lookups.rows.items()}


def finite(case: Case, *, fatal: bool) -> bool:
    """Whether the eager outputs are finite; where not and it is `fatal`, ExportError naming the output."""
    broken = [name for name, array in case.expected.items() if not np.isfinite(array).all()]
    if broken and fatal:
        raise ExportError(
            f"the eager module itself gives NaN or infinity in output {broken[0]!r} on {case.data} input: parity cannot be checked"
            "\ncheck the weights; if the model needs real input, give some with `data`"
        )
    return not broken


def bounded(
    specs: Sequence[TensorSpec], module: torch.nn.Module, dims: Mapping[str, int], preprocesses: Mapping[str, Preprocess]
) -> tuple[TensorSpec, ...]:
    """`specs` with the range of made-up numbers where it is known and was not given: rows of an Embedding, or raw pixels."""
    tables = integer_bounds(module, specs, dims)
    pixels = {name: preprocess.pixel_range() for name, preprocess in preprocesses.items()}
    return tuple(
        spec if spec.bounds is not None else dataclasses.replace(spec, bounds=tables.get(spec.name, pixels.get(spec.name)))
        for spec in specs
    )


def with_bounds(specs: Sequence[TensorSpec], bounded: Sequence[TensorSpec]) -> list[TensorSpec]:
    return [dataclasses.replace(spec, bounds=other.bounds) for spec, other in zip(specs, bounded, strict=True)]
