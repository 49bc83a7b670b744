"""The number formats that `convert` makes of an FP32 graph, and its options. Imports none of the libraries that do it.

A format is a folder beside this file, whose entry module has

    def convert_onnx(artifact: Artifact, data: CalibrationSet | None, options: ConvertOptions, progress: Progress) -> Converted
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.artifact.tensors import Profile
from deploy.errors import UsageError
from deploy.options import option

ConvertPrecision = Literal["fp16", "bf16"]


@dataclass(frozen=True)
class Format:
    """A format's help text, and its entry module."""

    text: str
    module: str


FORMATS: dict[ConvertPrecision, Format] = {
    "fp16": Format("Half precision: 5 bits of exponent, 10 of mantissa.", "deploy.precision.half.convert"),
    "bf16": Format("bfloat16: the range of FP32, 7 bits of mantissa.", "deploy.precision.half.convert"),
}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How to convert.

    profile: sizes of symbolic dimensions for made-up input are those of its optimum; None: the manifest's first profile.
    """

    precision: ConvertPrecision = option(switches={name: each.text for name, each in FORMATS.items()})
    fp16_io: bool = option(False, "Inputs and outputs in FP16 too; with --fp16 only, for numpy has no bfloat16.")
    data: Path | None = option(
        None, "Real input for activation ranges and parity: an ImageFolder, or a folder of .npz feeds.", metavar="DIR"
    )
    profile: Profile | None = None

    def __post_init__(self) -> None:
        if self.precision not in FORMATS:
            raise UsageError(f"`precision` must be {' or '.join(FORMATS)}, not {self.precision!r}")
        if self.fp16_io and self.precision != "fp16":
            raise UsageError("`fp16_io` needs the precision fp16: inputs and outputs in BF16 are not supported")
