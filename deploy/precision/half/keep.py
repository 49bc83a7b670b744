"""Which nodes must stay FP32 because half precision cannot represent their weights or activations."""

import numpy as np
import onnx_ir as ir

from deploy.precision.half.options import LARGEST, HalfPrecision
from deploy.precision.half.plan import Ports, plan_half, round_to
from deploy.precision.ranges import Range

HEADROOM = 2.0
"""On the data seen, activations may reach the largest number of the format divided by this factor.

The data is a sample: on new inputs of the same kind, the largest activation of a layer exceeds that of some hundred inputs
by tens of per cent, not by factors. A larger factor would cost speed without need.
"""

VANISHED = 1e-2
"""The largest tolerable rounding error of a tensor, in the L2 norm relative to that of the tensor. Above it, small numbers
have become zero or subnormal; if all numbers stay normal, the error is below 2^-11 (FP16) or 2^-8 (BF16)."""


def nodes_to_keep(model: ir.Model, ranges: dict[str, Range], precision: HalfPrecision) -> dict[str, str]:
    """Names of the nodes of a prepared model that must stay FP32, with the reason.

    `ranges`: those that `activation_ranges` measures on the same model. A node stays FP32 if half precision cannot
    represent one of the tensors that it would read or write in it, so that such a tensor is in half precision nowhere.
    """
    weights: dict[ir.Value, str] = {}
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            problem = weight_problem(value.const_value.numpy(), precision)
            if problem:
                weights[value] = f"weight {value.name!r} {problem}"
    keep = {}
    for node, ports in plan_half(model, precision).half.items():
        reason = _node_problem(node, ports, weights, ranges, precision)
        if reason and node.name:
            keep[node.name] = reason
    return keep


def weight_problem(weight: np.ndarray, precision: HalfPrecision) -> str:
    """Why half precision cannot represent a float32 tensor; "" if it can."""
    if not weight.size:
        return ""
    finite = np.isfinite(weight)
    values = weight if finite.all() else weight[finite]
    if not values.size:
        return ""
    rounded = round_to(values, precision).astype(np.float32)
    amax = float(np.abs(values).max())
    title = precision.upper()
    if not np.isfinite(rounded).all():
        return f"reaches {amax:.3g}; the largest {title} number is {LARGEST[precision]:.5g}"
    if amax == 0:
        return ""
    error = float(np.linalg.norm((rounded - values) / amax) / np.linalg.norm(values / amax))
    if error > VANISHED:
        return f"of at most {amax:.3g} vanishes in {title} (rounding error {error:.1%})"
    return ""


def _node_problem(
    node: ir.Node, ports: Ports, weights: dict[ir.Value, str], ranges: dict[str, Range], precision: HalfPrecision
) -> str:
    limit = LARGEST[precision] / HEADROOM
    tensors = [
        *(("input", node.inputs[index]) for index in ports.inputs),
        *(("output", node.outputs[index]) for index in ports.outputs),
    ]
    for side, value in tensors:
        assert value is not None
        if value in weights:
            return weights[value]
        seen = ranges.get(value.name or "")
        if seen is None:
            continue
        if seen.amax > limit:
            return (
                f"{side} {value.name!r} reaches {seen.amax:.3g}; the largest {precision.upper()} number is"
                f" {LARGEST[precision]:.5g}, and other inputs may give {HEADROOM:g} times as much"
            )
        problem = weight_problem(np.array([seen.amax], dtype=np.float32), precision)
        if problem:
            return f"{side} {value.name!r} {problem}"
    return ""
