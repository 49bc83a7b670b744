"""Parity: how far outputs are from a reference, and how far they may be."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deploy.errors import ParityError, UsageError

PARITY_BATCHES = (1, 2, 5)
"""Batch sizes at which an artifact with a symbolic batch is compared with its parent."""


_EXACT = 0.99
"""From this `min_agreement` on, a single integer that differs is too many where there are few."""

_MAP_RANK = 3

_SMALL_ERROR = 1e-3
"""The share of the largest magnitude below which an error counts as none, whatever the cosine of an output that is nearly constant."""

_NOISE = 1e-7
"""The magnitude up to which a whole output is what rounding leaves where there should be zeros."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far outputs may be from the reference.

    A vector of floats agrees when every `|actual - expected| <= atol + rtol * max|expected|`. The right side has the largest
    magnitude of the whole expected tensor, not that of the single element: rounding errors of a sum scale with its terms, and
    an element may be near zero only because its terms cancel. Where a limit by the whole tensor is set too, maps (rank 3 and
    more) and probabilities (all within 0 and 1) are held to that alone: one pixel at an edge says nothing. Such a limit holds for
    outputs of small numbers too.

    min_cosine, min_sqnr (dB): what every output of floats must reach; None: no limit.
    min_agreement: the share of equal elements, 0 to 1, that integers and booleans must reach.
    """

    rtol: float
    atol: float
    min_cosine: float | None = None
    min_sqnr: float | None = None
    min_agreement: float = 1.0

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol >= 0):
            raise UsageError(f"`rtol` and `atol` must be 0 or more, not {self.rtol} and {self.atol}")
        for name, value in (("min_cosine", self.min_cosine), ("min_agreement", self.min_agreement)):
            if value is not None and not value <= 1:
                raise UsageError(f"`{name}` must be at most 1, not {value}")


TOLERANCES = {
    "fp32": Tolerance(rtol=1e-4, atol=1e-5, min_agreement=0.999),
    "fp64": Tolerance(rtol=1e-4, atol=1e-5, min_agreement=0.999),
    "fp16": Tolerance(rtol=2e-2, atol=1e-3, min_cosine=0.999, min_sqnr=25.0, min_agreement=0.95),
    "bf16": Tolerance(rtol=1e-1, atol=1e-2, min_cosine=0.99, min_sqnr=15.0, min_agreement=0.9),
    "int8": Tolerance(rtol=5e-1, atol=1e-3, min_cosine=0.9, min_sqnr=7.0, min_agreement=0.75),
    "fp8": Tolerance(rtol=5e-1, atol=1e-3, min_cosine=0.9, min_sqnr=7.0, min_agreement=0.75),
}
"""Default tolerances by precision. FP16 carries 11 significant bits and BF16 8; errors grow over tens of layers. INT8 has
256 levels over the range of a whole tensor, and FP8 4 significant bits: their tolerance only detects what is broken (a scale that is half or twice what it
should be is an error of 6 dB); accuracy decides what is good enough."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One output against its reference.

    max_abs: the largest |actual - expected|, in the output's unit.
    max_rel: max_abs divided by the largest |expected| (max_abs itself if the reference is all zeros).
    cosine: cosine of the angle between the two, flattened; 1 when both are zero.
    sqnr_db: signal-to-noise ratio in dB, 10 log10(sum expected^2 / sum (actual - expected)^2); None if the two are
        equal or the reference is all zeros.
    agreement: of integers and booleans, the share of equal elements; None for floats.
    """

    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float | None = None
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """The differences of all outputs on one feed. `data` is `random`, `images` or `feeds`.

    sizes: the sizes of the dynamic dimensions other than the batch, where there are any.
    """

    data: str
    batch: int
    outputs: dict[str, Difference]
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BackendParity:
    """What one backend makes of the written file.

    backend: its name. by: its name and version. cases: those within the tolerance, until one is not.
    wrong: why what it computes, or that it computes nothing, rules it out; None where every case is within the tolerance.
    """

    backend: str
    by: str
    cases: list[ParityCase]
    wrong: str | None = None


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Evidence that an artifact computes what its parent computes.

    against: the reference (`eager`, the bare ONNX `file`, or the parent's digest).
    by: what computed the outputs (a backend and its version, or `emulation` of half precision).
    backends: the written file on each backend of the CPU that is installed.
    constant: outputs whose reference is one number everywhere: no comparison of them can fail.
    tiny: outputs that are within the tolerance for its `atol` alone, which is larger than all their numbers: zeros would be too.
    """

    against: str
    by: str
    tolerance: Tolerance
    cases: list[ParityCase]
    backends: list[BackendParity] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Difference:
        """The largest errors and the smallest cosine over all cases and outputs."""
        return worst_of(self.cases)

    def wrong_on(self, backend: str) -> str | None:
        """Why the file must not run on `backend`; None where nothing is known against it."""
        return next((each.wrong for each in self.backends if each.backend == backend), None)


def worst_of(cases: Sequence[ParityCase]) -> Difference:
    """The largest errors and the smallest cosine over all outputs of `cases`."""
    differences = [difference for case in cases for difference in case.outputs.values()]
    return Difference(
        max_abs=max(difference.max_abs for difference in differences),
        max_rel=max(difference.max_rel for difference in differences),
        cosine=min(difference.cosine for difference in differences),
        sqnr_db=min((difference.sqnr_db for difference in differences if difference.sqnr_db is not None), default=None),
        agreement=min((difference.agreement for difference in differences if difference.agreement is not None), default=None),
    )


def difference(actual: np.ndarray, expected: np.ndarray) -> Difference:
    """Compare two arrays of one shape; computed in float64.

    Non-finite elements are equal if both are the same infinity or both are NaN; otherwise `max_abs` and `max_rel` are infinite.
    """
    agreement = float(np.mean(actual == expected)) if expected.dtype.kind in "biu" and expected.size else None
    a = np.asarray(actual, dtype=np.float64).ravel()
    b = np.asarray(expected, dtype=np.float64).ravel()
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.all():
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return Difference(max_abs=float("inf"), max_rel=float("inf"), cosine=0.0)
        a, b = a[finite], b[finite]
    if not a.size:
        return Difference(max_abs=0.0, max_rel=0.0, cosine=1.0, agreement=agreement)
    max_abs = float(np.abs(a - b).max())
    scale = float(np.abs(b).max())
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = 1.0 if norms == 0 and max_abs == 0 else float(a @ b) / norms if norms else 0.0
    noise, signal = float(np.square(a - b).sum()), float(np.square(b).sum())
    sqnr_db = 10 * math.log10(signal / noise) if noise and signal else None
    max_rel = max_abs / scale if scale else max_abs
    return Difference(max_abs=max_abs, max_rel=max_rel, cosine=cosine, sqnr_db=sqnr_db, agreement=agreement)


def problem(off: Difference, expected: np.ndarray, tolerance: Tolerance) -> tuple[str, str] | None:
    """How far an output that differs by `off` from `expected` is off, and how far it may be; None where it is within `tolerance`."""
    if expected.dtype.kind in "biu":
        return _too_few_agree(off, expected.size, tolerance.min_agreement)
    values = np.asarray(expected, dtype=np.float64)
    finite = values[np.isfinite(values)]
    scale = float(np.abs(finite).max(initial=0.0))
    limit = tolerance.atol + tolerance.rtol * scale
    head = f"is off by {off.max_abs:.3g}"
    figures = f"cosine {off.cosine:.6f}" + ("" if off.sqnr_db is None else f", signal to noise {off.sqnr_db:.1f} dB")
    by_elements = (
        f"at most {limit:.3g} is allowed (`rtol` {tolerance.rtol:g} of {scale:.3g}, `atol` {tolerance.atol:g}; {figures})"
    )
    if not math.isfinite(off.max_abs):
        return head, by_elements
    by_whole = tolerance.min_cosine is not None or tolerance.min_sqnr is not None
    if scale > _NOISE and off.max_abs > min(tolerance.atol, _SMALL_ERROR * scale):
        if tolerance.min_cosine is not None and off.cosine < tolerance.min_cosine:
            return head, f"a cosine of at least {tolerance.min_cosine:g} is asked for (`min_cosine`; {figures})"
        if tolerance.min_sqnr is not None and off.sqnr_db is not None and off.sqnr_db < tolerance.min_sqnr:
            return head, f"a signal to noise of at least {tolerance.min_sqnr:g} dB is asked for (`min_sqnr`; {figures})"
    if by_whole and (values.ndim >= _MAP_RANK or (finite.size > 0 and finite.min() >= 0 and finite.max() <= 1)):
        return None
    return None if off.max_abs <= limit else (head, by_elements)


def _too_few_agree(off: Difference, size: int, least: float) -> tuple[str, str] | None:
    differing = round((1 - (1.0 if off.agreement is None else off.agreement)) * size)
    allowed = int((1 - least) * size) if least >= _EXACT else math.ceil((1 - least) * size)
    if differing <= allowed:
        return None
    return f"differs in {differing} of {size} elements", f"{least:.1%} must agree (`min_agreement`)"


def judge(
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    tolerance: Tolerance,
    *,
    data: str,
    batch: int,
    sizes: Mapping[str, int] | None = None,
) -> tuple[ParityCase, str]:
    """The differences of all outputs on one feed, and what is wrong with them; "" where all are within `tolerance`."""
    sizes = dict(sizes or {})
    if set(actual) != set(expected):
        names = f"the outputs are {', '.join(sorted(actual))}; those of the reference are {', '.join(sorted(expected))}"
        return ParityCase(data=data, batch=batch, outputs={}, sizes=sizes), names
    differences, wrong = {}, ""
    where = "".join(f", {name} {size}" for name, size in sizes.items())
    for name, reference in expected.items():
        result = actual[name]
        if result.shape != reference.shape:
            wrong = (
                wrong or f"output {name!r} has shape {result.shape} at batch {batch}{where}; the reference has {reference.shape}"
            )
            continue
        differences[name] = off = difference(result, reference)
        if not wrong and (found := problem(off, reference, tolerance)):
            wrong = f"output {name!r} {found[0]} at batch {batch}{where} on {data} input; {found[1]}"
    return ParityCase(data=data, batch=batch, outputs=differences, sizes=sizes), wrong


def compare(
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    tolerance: Tolerance,
    *,
    data: str,
    batch: int,
    what: str,
) -> ParityCase:
    """As `judge`. `what` names the artifact in the error.

    Raises ParityError when the names of the outputs differ, or an output has another shape or differs by more than `tolerance`.
    """
    case, wrong = judge(actual, expected, tolerance, data=data, batch=batch)
    if wrong:
        raise ParityError(f"{what}: {wrong}")
    return case


def constant_outputs(references: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    """The outputs that are one finite number in all elements of all `references`: no comparison of them can fail."""
    names = list(references[0]) if references else []
    return [name for name in names if _constant([reference[name] for reference in references])]


def tiny_outputs(references: Sequence[Mapping[str, np.ndarray]], cases: Sequence[ParityCase], tolerance: Tolerance) -> list[str]:
    """The outputs of floats that agree for `atol` alone: in all `references` below it, and in one of `cases` off by more than `rtol`.

    An output that must reach a cosine or a signal to noise is not among them, unless it is too small for these too.
    """
    by_whole = tolerance.min_cosine is not None or tolerance.min_sqnr is not None
    most = min(tolerance.atol, _NOISE) if by_whole else tolerance.atol
    names = list(references[0]) if references else []
    return [
        name
        for name in names
        if references[0][name].dtype.kind == "f"
        and 0 < max(float(np.abs(reference[name]).max(initial=0.0)) for reference in references) <= most
        and max(case.outputs[name].max_rel for case in cases) > tolerance.rtol
    ]


def _constant(arrays: Sequence[np.ndarray]) -> bool:
    if all(array.size <= (len(array) if array.ndim else 1) for array in arrays):
        return False  # one number a row, such as a class, may well be the same by chance
    first = next(array.ravel()[0] for array in arrays if array.size)
    return all(bool((array == first).all()) for array in arrays)
