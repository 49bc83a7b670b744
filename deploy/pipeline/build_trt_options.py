"""The options of `build-trt`. Imports none of the libraries that do it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deploy.artifact.manifest import FLAVOURS
from deploy.engine.options import BuildOptions
from deploy.errors import UsageError
from deploy.evidence.options import ToleranceOptions
from deploy.options import option
from deploy.precision.half.options import HalfPrecision
from deploy.precision.int8.options import QuantizeOptions


@dataclass(frozen=True, kw_only=True)
class BuildTrtOptions:
    """What to build.

    precision: None takes the precisions of the file as they are.
    shapes: each a shape such as `1x3x224x224`. An input left out takes the sizes of the symbolic dimensions that it shares
        with one that is given, and else the range in the manifest.
    int8, fp8: an artifact that is quantized to that already is taken as it is.
    """

    precision: HalfPrecision | None = option(
        None, switches={"fp16": "Convert to FP16 first.", "bf16": "Convert to bfloat16 first."}
    )
    fp16_io: bool = option(False, "Inputs and outputs in FP16 too.")
    data: Path | None = option(
        None, "Real input for the conversion, its ranges and parity: an ImageFolder, or a folder of .npz feeds.", metavar="DIR"
    )
    int8: bool = option(False, "Quantize first, with --calib; with --fp16, what is not INT8 is FP16.")
    fp8: bool = option(False, "The same in FP8 (E4M3): Gemm and MatMul alone, for GPUs from compute capability 8.9 on.")
    flavour: str = option("auto", f"auto, {' or '.join(FLAVOURS)}.", metavar="F")
    shapes: tuple[str, ...] = option(
        (),
        "Range of one input's shape, such as x=1x8:4x8:9x8; the same input again begins the next optimization profile.",
        metavar="NAME=MIN:OPT:MAX",
    )
    refit_from: Path | None = option(
        None,
        "An engine of the same network, built with --strip: it gets the weights of ARTIFACT, and nothing is built.",
        metavar="ENGINE",
    )
    allow_slower: bool = option(False, "With --int8 or --fp8 on a GPU: keep an engine that is slower than FP16.")
    cache: bool = option(True, "Build anew where the same engine was built before, and do not keep it.")
    quantization: QuantizeOptions = field(default_factory=QuantizeOptions)
    tolerance: ToleranceOptions = field(default_factory=ToleranceOptions)
    build: BuildOptions = field(default_factory=BuildOptions)

    def __post_init__(self) -> None:
        if self.precision is None and (self.fp16_io or self.data is not None):
            raise UsageError("`fp16_io` and `data` need a `precision`: they are for the conversion")
        if self.int8 and self.fp8:
            raise UsageError("`int8` and `fp8` exclude one another; name one of them")
        if self.quantizes and (self.precision == "bf16" or self.fp16_io or self.data is not None):
            raise UsageError(
                f"`{self.quantizes}` takes fp16 for the rest, or no `precision` at all; leave out bf16, `fp16_io` and `data`"
            )
        if self.allow_slower and not self.quantizes:
            raise UsageError("`allow_slower` needs `int8` or `fp8`: they alone are timed against FP16")
        if self.refit_from is not None and (self.shapes or self.flavour != "auto" or self.build != BuildOptions()):
            raise UsageError(
                "`refit_from` takes the engine as it was built: leave out `shapes`, `flavour` and all that is for a build"
            )
        if not self.quantizes and self.quantization != QuantizeOptions():
            raise UsageError("the options of quantization need `int8` or `fp8`")
        if self.quantization.fp8 or self.quantization.fp16:
            raise UsageError("`quantization` says how: that it is `fp8`, and the `precision` of the rest, are options beside it")
        _ = self.quantize  # raises now what does not go together

    @property
    def quantizes(self) -> Literal["int8", "fp8"] | None:
        """What is quantized to first, if anything is."""
        return "int8" if self.int8 else "fp8" if self.fp8 else None

    @property
    def quantize(self) -> QuantizeOptions | None:
        """How to quantize first, if that is asked for."""
        if not self.quantizes:
            return None
        return dataclasses.replace(self.quantization, fp16=self.precision == "fp16", fp8=self.fp8)
