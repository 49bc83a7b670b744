"""The half-precision formats and the options of a conversion. Imports none of the libraries that do it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from deploy.artifact.tensors import Profile
from deploy.errors import UsageError
from deploy.evidence.parity import TOLERANCES, Tolerance
from deploy.options import option

HalfPrecision = Literal["fp16", "bf16"]

PRECISIONS: tuple[HalfPrecision, ...] = get_args(HalfPrecision)

OPSET: dict[HalfPrecision, int] = {"fp16": 1, "bf16": 22}
"""The lowest opset that a graph may have: before 22, convolution and pooling are not defined for BF16."""

LARGEST: dict[HalfPrecision, float] = {"fp16": 65504.0, "bf16": (2 - 2**-7) * 2.0**127}
"""The largest finite number of each format."""

IMAGES = 128
"""Images of `data` that activation ranges are read from, drawn evenly over the classes."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How to convert.

    profile: sizes of symbolic dimensions for random input are those of its optimum; None: the manifest's first profile.
    rtol, atol: the tolerance of parity; None: `TOLERANCES` of the precision.
    """

    precision: HalfPrecision = option(
        switches={
            "fp16": "Half precision: 5 bits of exponent, 10 of mantissa.",
            "bf16": "bfloat16: the range of FP32, 7 bits of mantissa.",
        }
    )
    fp16_io: bool = option(False, "Inputs and outputs in FP16 too; with --fp16 only, for numpy has no bfloat16.")
    data: Path | None = option(None, "Real images for activation ranges and parity, beside random input.", metavar="IMAGEFOLDER")
    profile: Profile | None = None
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"`precision` must be fp16 or bf16, not {self.precision!r}")
        if self.fp16_io and self.precision != "fp16":
            raise UsageError("`fp16_io` needs the precision fp16: inputs and outputs in BF16 are not supported")
        self.tolerance()  # raises now, not after the conversion

    def tolerance(self) -> Tolerance:
        default = TOLERANCES[self.precision]
        return Tolerance(
            rtol=default.rtol if self.rtol is None else self.rtol, atol=default.atol if self.atol is None else self.atol
        )
