"""Which nodes must stay FP32 because half precision cannot represent their weights or activations."""

import numpy as np
import onnx_ir as ir

from deploy.precision.half.guards import lost_guards
from deploy.precision.half.options import EPSILON, LARGEST, HalfPrecision
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
    guards = lost_guards(model, precision)
    weights: dict[ir.Value, str] = {}
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            problem = weight_problem(value.const_value.numpy(), precision)
            if problem:
                weights[value] = f"weight {value.name!r} {problem}"
    keep = {}
    for node, ports in plan_half(model, precision).half.items():
        reason = guards.get(node.name or "") or _node_problem(node, ports, weights, ranges, precision)
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
        if value in weights and not _drowned(node, value, ranges, precision):
            return weights[value]
        seen = ranges.get(value.name or "")
        if seen is None:
            continue
        if seen.amax > limit:
            return (
                f"{side} {value.name!r} reaches {seen.amax:.3g}; the largest {precision.upper()} number is"
                f" {LARGEST[precision]:.5g}, and other inputs may give {HEADROOM:g} times as much"
            )
        if _is_whole(value) and seen.amax > 1 / EPSILON[precision]:
            return (
                f"{side} {value.name!r} has whole numbers up to {seen.amax:.0f}; {precision.upper()} holds all of them up to"
                f" {1 / EPSILON[precision]:.0f}"
            )
        problem = weight_problem(np.array([seen.amax], dtype=np.float32), precision)
        if problem:
            return f"{side} {value.name!r} {problem}"
    return ""


def _is_whole(value: ir.Value) -> bool:
    """Whether the numbers of a float tensor are integers that were cast: positions, times, identifiers."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return source is not None and source.dtype is not None and source.dtype.is_integer()


def _drowned(node: ir.Node, weight: ir.Value, ranges: dict[str, Range], precision: HalfPrecision) -> bool:
    """Whether rounding `weight`, which `node` adds, changes the output by less than the output is rounded by itself."""
    places = {"Add": (0, 1), "Sub": (0, 1), "Sum": range(len(node.inputs)), "Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,)}
    added = places.get(node.op_type, ())
    if not added or any(value is weight and index not in added for index, value in enumerate(node.inputs)):
        return False
    seen = ranges.get(node.outputs[0].name or "")
    if seen is None or weight.const_value is None:
        return False
    exact = weight.const_value.numpy()
    off = float(np.abs(round_to(exact, precision).astype(np.float32) - exact).max(initial=0.0))
    return off <= EPSILON[precision] * seen.amax
