"""Which layers cannot be INT8 in a graph whose scales are FP16."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from deploy.precision.int8.placement import Placement
from deploy.precision.int8.rewrite import quantize_weight

SMALLEST_FP16 = 2.0**-14
"""The smallest normal number of FP16. Smaller scales lose their digits, and runtimes may take them for 0."""


def subnormal_scales(
    model: onnx.ModelProto, placement: Placement, scales: Mapping[str, float], *, per_tensor: bool
) -> dict[str, str]:
    """Names of the quantized layers with a scale below `SMALLEST_FP16`, and the reason.

    A channel of a weight whose scale is smaller may take `SMALLEST_FP16` when that is no more than the layer's median
    scale: its rounding error is then no larger than that of the channels beside it. A layer with others stays out.
    """
    found: dict[str, str] = {}
    for tensor, uses in placement.edges.items():
        if scales[tensor] < SMALLEST_FP16:
            reason = f"the scale of {tensor!r}, {scales[tensor]:.2g}, would be subnormal in FP16"
            found |= {node: reason for node, _ in uses}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node, weight in placement.weights.items():
        array = numpy_helper.to_array(weights[weight.initializer])
        _, steps = quantize_weight(array, None if per_tensor else weight.axis)
        if float(np.min(steps)) < SMALLEST_FP16 and float(np.median(steps)) < SMALLEST_FP16:
            smallest = float(np.min(steps))
            found.setdefault(node, f"scales of {weight.initializer!r}, down to {smallest:.2g}, would be subnormal in FP16")
    return found
