"""Which nodes must stay FP32: those whose weights or activations half precision cannot hold."""

import numpy as np
import onnx
import onnx_ir as ir

from deploy.precision.graph import prepare
from deploy.precision.half.options import LARGEST, OPSET, HalfPrecision
from deploy.precision.half.plan import Ports, plan_half, round_to
from deploy.precision.ranges import Range

HEADROOM = 2.0
"""Activations may reach the format's largest number divided by this on the data seen.

What was seen is a sample: the largest activation of a layer over new inputs exceeds that over some hundred by tens of per
cent, not by factors, unless the inputs are of another sort. More would cost speed where nothing threatens.
"""

VANISHED = 1e-2
"""A tensor whose rounding error, in the L2 norm relative to its own, is larger has lost its small numbers to zero or to the
subnormal range. Where all numbers are normal it is below 2^-11 (FP16) or 2^-8 (BF16)."""


def nodes_to_keep(model: onnx.ModelProto, ranges: dict[str, Range], precision: HalfPrecision) -> dict[str, str]:
    """Names of nodes that must stay FP32, with the reason. `ranges` as of `activation_ranges`, by the prepared graph.

    A node stays when one of the tensors that it would take or make in half precision does not fit: then that tensor is
    nowhere in half precision.
    """
    graph = ir.from_proto(prepare(model, opset=OPSET[precision]))
    weights: dict[ir.Value, str] = {}
    for value in graph.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            problem = weight_problem(value.const_value.numpy(), precision)
            if problem:
                weights[value] = f"weight {value.name!r} {problem}"
    keep = {}
    for node, ports in plan_half(graph, precision).half.items():
        reason = _node_problem(node, ports, weights, ranges, precision)
        if reason and node.name:
            keep[node.name] = reason
    return keep


def weight_problem(weight: np.ndarray, precision: HalfPrecision) -> str:
    """What half precision does to a float32 tensor that it must not; "" when it holds it."""
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
