"""Guards that half precision rounds away: the 1e-12 that keeps a division, a logarithm or a root from zero."""

import numpy as np
import onnx_ir as ir

from deploy.precision.graph import STANDARD
from deploy.precision.half.options import HalfPrecision
from deploy.precision.half.plan import round_to

_LOST = 0.25
"""The share of a guard that rounding may change: its size is chosen by tens."""

_KEEPS = frozenset(
    (
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Identity",
        "Max",
        "Mul",
        "Reshape",
        "Slice",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)
"""Operators whose output may be as small as an input is."""


def lost_guards(model: ir.Model, precision: HalfPrecision) -> dict[str, str]:
    """The nodes, by name with the reason, from a guard that half precision rounds away to what it guards.

    A guard is a small positive constant that is the minimum of a Clip, an operand of Max, or added; it is lost where the half
    of it is zero or off by more than a quarter, and what it bounds goes into a divisor, a Reciprocal, a Log, a root or a power.
    """
    found: dict[str, str] = {}
    for node in model.graph:
        bound = _guard(node)
        if bound is None or bound >= 1 or not _is_lost(bound, precision):
            continue
        reason = f"its guard of {bound:.3g} vanishes in {precision.upper()}"
        path = _guarded(node.outputs[0], bound, precision, {})
        for each in [node, *path] if path else ():
            if each.name:
                found.setdefault(each.name, reason)
    return found


def _is_lost(bound: float, precision: HalfPrecision) -> bool:
    half = float(round_to(np.array([bound], np.float32), precision).astype(np.float32)[0])
    return abs(half - bound) > _LOST * bound


def _guard(node: ir.Node) -> float | None:
    """The positive constant below which the output of `node` does not fall, or that is there to keep it from zero."""
    if node.domain not in STANDARD:
        return None
    if node.op_type == "Clip":
        value = node.inputs[1] if len(node.inputs) > 1 else None
        return _positive(value)
    if node.op_type in ("Add", "Max", "Sum"):
        bounds = [bound for value in node.inputs if (bound := _positive(value)) is not None]
        return bounds[0] if bounds else None
    return None


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _positive(value: ir.Value | None) -> float | None:
    """The number of a constant of one element, or of the same number everywhere, where it is above 0."""
    if value is None or value.const_value is None or value.dtype != ir.DataType.FLOAT or not value.const_value.size:
        return None
    if value.const_value.size > 1 << 16:
        return None
    array = value.const_value.numpy().ravel()
    return float(array[0]) if array[0] > 0 and (array == array[0]).all() else None


def _guarded(value: ir.Value, bound: float, precision: HalfPrecision, known: dict[ir.Value, list[ir.Node]]) -> list[ir.Node]:
    """The nodes from `value`, which may be as small as `bound`, to what must not meet zero; none where nothing does."""
    if value in known:
        return known[value]
    path = known[value] = []
    for node, index in value.uses():
        if node.domain not in STANDARD:
            continue
        if _meets_zero(node, index):
            path.append(node)
            if node.op_type in ("Reciprocal", "Pow") or (node.op_type == "Div" and _is_constant(node.inputs[0])):
                path += [user for user, _ in node.outputs[0].uses()]  # as large as the guard is small, until it is multiplied
        elif node.op_type == "Sqrt":
            root = bound**0.5
            path += [node, *(_guarded(node.outputs[0], root, precision, known) if _is_lost(root, precision) else [])]
        elif node.op_type in _KEEPS:
            least = bound * min(bound, 1.0) if node.op_type == "Mul" else bound  # the other factor may be as small
            if behind := _guarded(node.outputs[0], least, precision, known):
                path += [node, *behind]
    return path


def _meets_zero(node: ir.Node, index: int) -> bool:
    """Whether input `index` of `node` must not be zero."""
    return (
        (node.op_type == "Div" and index == 1) or node.op_type in ("Log", "Reciprocal") or (node.op_type == "Pow" and index == 0)
    )
