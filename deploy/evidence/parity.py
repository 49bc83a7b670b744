"""Parity: how far outputs are from a reference, and how far they may be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deploy.errors import ParityError, UsageError

PARITY_BATCHES = (1, 2, 5)
"""Batch sizes at which an artifact with a symbolic batch is compared with its parent."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Outputs agree when every `|actual - expected| <= atol + rtol * max|expected|`.

    The right side has the largest magnitude of the whole expected tensor, not that of the single element: rounding errors of
    a sum scale with its terms, and an element may be near zero only because its terms cancel.
    """

    rtol: float
    atol: float

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol >= 0):
            raise UsageError(f"`rtol` and `atol` must be 0 or more, not {self.rtol} and {self.atol}")


TOLERANCES = {
    "fp32": Tolerance(rtol=1e-4, atol=1e-5),
    "fp16": Tolerance(rtol=2e-2, atol=1e-3),
    "bf16": Tolerance(rtol=1e-1, atol=1e-2),
    "int8": Tolerance(rtol=5e-1, atol=1e-3),
}
"""Default tolerances by precision. FP16 carries 11 significant bits and BF16 8; errors grow over tens of layers. INT8 has
256 levels over the range of a whole tensor: its tolerance only detects what is broken; accuracy decides what is good enough."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One output against its reference.

    max_abs: the largest |actual - expected|, in the output's unit.
    max_rel: max_abs divided by the largest |expected| (max_abs itself if the reference is all zeros).
    cosine: cosine of the angle between the two, flattened; 1 when both are zero.
    sqnr_db: signal-to-noise ratio in dB, 10 log10(sum expected^2 / sum (actual - expected)^2); None if the two are
        equal or the reference is all zeros.
    """

    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """The differences of all outputs on one batch. `data` is `random`, `images` or `feeds`."""

    data: str
    batch: int
    outputs: dict[str, Difference]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Evidence that an artifact computes what its parent computes.

    against: the reference (`eager`, or the parent's digest).
    by: what computed the outputs (a backend and its version, or `emulation` of half precision).
    """

    against: str
    by: str
    tolerance: Tolerance
    cases: list[ParityCase]

    @property
    def worst(self) -> Difference:
        """The largest errors and the smallest cosine over all cases and outputs."""
        differences = [difference for case in self.cases for difference in case.outputs.values()]
        return Difference(
            max_abs=max(difference.max_abs for difference in differences),
            max_rel=max(difference.max_rel for difference in differences),
            cosine=min(difference.cosine for difference in differences),
            sqnr_db=min((difference.sqnr_db for difference in differences if difference.sqnr_db is not None), default=None),
        )


def difference(actual: np.ndarray, expected: np.ndarray) -> Difference:
    """Compare two arrays of one shape; computed in float64.

    Non-finite elements are equal if both are the same infinity or both are NaN; otherwise `max_abs` and `max_rel` are infinite.
    """
    a = np.asarray(actual, dtype=np.float64).ravel()
    b = np.asarray(expected, dtype=np.float64).ravel()
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return Difference(max_abs=float("inf"), max_rel=float("inf"), cosine=0.0)
    a, b = a[finite], b[finite]
    if not a.size:
        return Difference(max_abs=0.0, max_rel=0.0, cosine=1.0)
    max_abs = float(np.abs(a - b).max())
    scale = float(np.abs(b).max())
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = 1.0 if norms == 0 and max_abs == 0 else float(a @ b) / norms if norms else 0.0
    noise, signal = float(np.square(a - b).sum()), float(np.square(b).sum())
    sqnr_db = 10 * math.log10(signal / noise) if noise and signal else None
    return Difference(max_abs=max_abs, max_rel=max_abs / scale if scale else max_abs, cosine=cosine, sqnr_db=sqnr_db)


def compare(
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    tolerance: Tolerance,
    *,
    data: str,
    batch: int,
    what: str,
) -> ParityCase:
    """Compare all outputs of one batch. `what` names the artifact in the error.

    Raises ParityError when the names of the outputs differ, or an output has another shape or differs by more than `tolerance`.
    """
    if set(actual) != set(expected):
        raise ParityError(f"{what} has the outputs {', '.join(sorted(actual))}; the reference has {', '.join(sorted(expected))}")
    differences = {}
    for name, reference in expected.items():
        result = actual[name]
        if result.shape != reference.shape:
            raise ParityError(
                f"{what}: output {name!r} has shape {result.shape} at batch {batch}; the reference has {reference.shape}"
            )
        off = difference(result, reference)
        values = np.asarray(reference, dtype=np.float64)
        scale = float(np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=0.0))
        limit = tolerance.atol + tolerance.rtol * scale
        if not off.max_abs <= limit:
            raise ParityError(
                f"{what}: output {name!r} is off by {off.max_abs:.3g} at batch {batch} on {data} input; at most {limit:.3g} is allowed"
                f" (rtol {tolerance.rtol:g} of {scale:.3g}, atol {tolerance.atol:g}; cosine {off.cosine:.6f})"
            )
        differences[name] = off
    return ParityCase(data=data, batch=batch, outputs=differences)
