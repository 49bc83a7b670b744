"""How to quantize. Imports none of the libraries that do it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from deploy.artifact.artifact import Artifact
from deploy.calibration.thresholds import METHODS
from deploy.data.calibration_set import CalibrationSet
from deploy.errors import UsageError
from deploy.host.versions import tool_versions
from deploy.options import option

AUTO = "auto"
"""The method that compares the others at the output of the layers: see `deploy.precision.int8.choose`."""

METHOD = AUTO
"""The default method for INT8."""

FP8_METHOD = "max"
"""That for FP8, whose steps are as fine beside the largest number as elsewhere: what is cut off is lost for nothing (docs/int8.md)."""

_METHODS = (AUTO, *METHODS)

STEPPED = ("mse", "entropy")
"""The methods that count the equal steps of INT8; those of FP8 are not."""

OPSET = 19
"""The first opset in which Q/DQ pairs may have FP16 scales, which the FP16 pass over a quantized graph gives them."""

REVISION = 10
"""Of the passes: raised where the same request gives other scales or names of tensors, so that what older code has kept is not taken."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How to quantize.

    fp8: E4M3 in place of INT8; see `deploy.precision.codes`.
    method: how the largest magnitude that the codes are to hold is chosen for an activation: see `calibration.thresholds`, and `AUTO`;
        None for `METHOD` or `FP8_METHOD`.
    percentile: per cent of the magnitudes that the method `percentile` keeps.
    per_tensor: one scale for a weight, not one for each of its output channels.
    exclude: names of nodes or modules, operators (`Gemm`) or patterns (`layer4*`).
    include: as exclude: layers to quantize that `deploy.precision.int8.rules` would leave in floating point.
    keep_below: a node whose output has less signal to quantization noise than this many dB, by itself, stays in floating point.
    min_share: per cent of the multiply-accumulates of layers with weights that must be quantized, without those that `exclude` names.
    fp16: the scales are FP16 too, so that no Cast stands between layers.
    """

    fp8: bool = option(False, "FP8 (E4M3) in place of INT8: Gemm and MatMul alone, for GPUs from compute capability 8.9 on.")
    method: str | None = option(
        None,
        f"Scales by {', '.join(_METHODS[:-1])} or {_METHODS[-1]}.",
        metavar="M",
        default=f"{METHOD}, and {FP8_METHOD} with --fp8",
    )
    percentile: float = 99.99
    batch_size: int = option(2, "Images of one run; does not change the scales.", metavar="B")
    per_tensor: bool = option(False, "One scale for a weight, not one for each output channel.")
    exclude: tuple[str, ...] = option(
        (), "Leave in floating point: a node, an operator or a pattern. May be repeated.", metavar="NODE"
    )
    include: tuple[str, ...] = option(
        (), "Quantize what a rule leaves in floating point, such as products of attention. May be repeated.", metavar="NODE"
    )
    float_first: bool = option(False, "Leave the first layer in floating point.")
    float_last: bool = option(False, "Leave the last layer in floating point.")
    keep_below: float = option(10.0, "Leave layers in floating point whose signal to noise is below it, in dB.", metavar="DB")
    min_share: float = option(
        90.0,
        "Multiply-accumulates of layers with weights that must be quantized, without what --exclude names.",
        metavar="PERCENT",
    )
    bias_correction: bool = option(True, "Keep the mean error of each layer, which is otherwise taken away with its bias.")
    equalize: bool | None = option(
        None,
        "Equalize ranges across layers first.",
        default="with --per-tensor, and where there are depthwise layers; else where channels stand out",
    )
    fp16: bool = option(False, "FP16 for what is not quantized, and for the scales.")

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in _METHODS:
            raise UsageError(f"unknown method {self.method!r}; expected one of {', '.join(_METHODS)}")
        if self.fp8 and self.method in STEPPED:
            raise UsageError(f"`method` {self.method} counts the steps of INT8: with `fp8`, take percentile, max or {AUTO}")
        if not 50 <= self.percentile <= 100:
            raise UsageError(f"`percentile` must be 50 to 100, not {self.percentile:g}")
        if not 0 <= self.min_share <= 100:
            raise UsageError(f"`min_share` must be 0 to 100 per cent, not {self.min_share:g}")
        if math.isnan(self.keep_below):
            raise UsageError("`keep_below` must be a number of dB")
        if self.batch_size < 1:
            raise UsageError(f"`batch_size` must be 1 or more, not {self.batch_size}")

    @property
    def chosen_method(self) -> str:
        """The method, by default that of the codes."""
        return self.method or (FP8_METHOD if self.fp8 else METHOD)

    @property
    def precision(self) -> Literal["int8", "fp8"]:
        """What is quantized to."""
        return "fp8" if self.fp8 else "int8"

    @property
    def floats(self) -> Literal["fp16", "fp32"]:
        """The precision of what is not quantized."""
        return "fp16" if self.fp16 else "fp32"


def quantize_settings(options: QuantizeOptions) -> dict[str, Any]:
    """The options that the result depends on, as JSON-like values."""
    settings = {key: value for key, value in dataclasses.asdict(options).items() if key not in ("batch_size", "fp16")}
    return settings | {"floats": options.floats, "method": options.chosen_method}


def quantize_request(artifact: Artifact, data: CalibrationSet, options: QuantizeOptions) -> dict[str, Any] | None:
    """Everything that scales and corrections depend on, as JSON-like values; None when the data can be read only once."""
    content = data.digest()
    if content is None:
        return None
    return {
        "parent": artifact.manifest.digest,
        "data": content,
        "options": quantize_settings(options),
        "tools": tool_versions(),
        "revision": REVISION,
    }
