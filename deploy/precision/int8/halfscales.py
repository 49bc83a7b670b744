"""Which layers cannot be quantized in a graph with FP16 scales."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from deploy.precision.codes import Codes
from deploy.precision.int8.placement import Placement

SMALLEST_FP16 = 2.0**-14
"""The smallest normal number of FP16. Smaller scales lose digits, and runtimes may treat them as 0."""


def subnormal_scales(
    model: ir.Model, placement: Placement, scales: Mapping[str, float], codes: Codes, *, per_tensor: bool
) -> dict[str, str]:
    """Names of the layers of a prepared model that have a scale below `SMALLEST_FP16`, with the reason.

    Where the codes have slack, a smaller scale may be `SMALLEST_FP16` instead. So may that of a channel of a weight, provided that
    the median scale of the layer needs no more than the slack: its rounding error is then no larger than that of the other channels.
    """
    reasons: dict[str, str] = {}
    for name, uses in placement.edges.items():
        if scales[name] * codes.slack < SMALLEST_FP16:
            reason = f"the scale of {name!r}, {scales[name]:.2g}, would be subnormal in FP16"
            reasons |= {node: reason for node, _ in uses}
    for node, weight in placement.weights.items():
        tensor = model.graph.initializers[weight.initializer].const_value
        assert tensor is not None
        _, steps = codes.quantize_weight(tensor.numpy(), None if per_tensor else weight.axis)
        if float(np.median(steps)) * codes.slack < SMALLEST_FP16:
            smallest = float(np.min(steps))
            reasons.setdefault(node, f"scales of {weight.initializer!r}, down to {smallest:.2g}, would be subnormal in FP16")
    return reasons
