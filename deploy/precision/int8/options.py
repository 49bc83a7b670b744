"""The options of INT8 quantization, and what its result depends on.

Imports no heavy library, so that options can be checked, and an existing result recognized, before onnx is loaded.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from deploy.artifact.artifact import Artifact
from deploy.calibration.thresholds import METHODS
from deploy.data.calibration_set import CalibrationSet
from deploy.errors import UsageError
from deploy.host.versions import tool_versions

METHOD = "percentile"
"""The default method: it loses the least accuracy on the benchmarks (README, INT8)."""

OPSET = 19
"""The first opset in which Q/DQ pairs may have FP16 scales, which the FP16 pass over a quantized graph gives them."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How to quantize.

    method: how to choose the largest magnitude that INT8 can represent for an activation: see `calibration.thresholds`.
    percentile: the percentage of the magnitudes that `percentile` keeps.
    batch_size: rows in one run during calibration; the scales do not depend on it.
    per_tensor: one scale for a whole weight instead of one for each of its output channels.
    exclude: nodes to leave in floating point: names of nodes or modules, operators (`Gemm`) or patterns (`layer4*`).
    float_first, float_last: leave the first or the last layers with weights in floating point.
    bias_correction: subtract the mean error of each layer through its bias.
    equalize: equalize ranges across layers first; None: with `per_tensor`, and for a graph with depthwise convolutions.
    floats: the precision of everything that is not INT8. With `fp16` the scales are FP16 too, so that no Cast stands
        between layers.
    """

    method: str = METHOD
    percentile: float = 99.99
    batch_size: int = 2
    per_tensor: bool = False
    exclude: tuple[str, ...] = ()
    float_first: bool = False
    float_last: bool = False
    bias_correction: bool = True
    equalize: bool | None = None
    floats: Literal["fp32", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; expected one of {', '.join(METHODS)}")
        if not 50 <= self.percentile <= 100:
            raise UsageError(f"`percentile` must be 50 to 100, not {self.percentile:g}")
        if self.batch_size < 1:
            raise UsageError(f"`batch_size` must be 1 or more, not {self.batch_size}")


def quantize_request(artifact: Artifact, data: CalibrationSet, options: QuantizeOptions) -> dict[str, Any] | None:
    """Everything that scales and corrections depend on; None when the data can be read only once."""
    content = data.digest()
    if content is None:
        return None
    return {
        "parent": artifact.manifest.digest,
        "data": content,
        "options": quantize_settings(options),
        "tools": tool_versions(),
    }


def quantize_settings(options: QuantizeOptions) -> dict[str, Any]:
    """The options that the result depends on."""
    return {key: value for key, value in dataclasses.asdict(options).items() if key != "batch_size"}
