"""From the range of every activation to its scale, shared or of its own, and to what is taken off before."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import onnx_ir as ir

from deploy.calibration.histogram import Histogram
from deploy.precision.graph import STANDARD
from deploy.precision.int8.histograms import scale_of
from deploy.precision.int8.placement import Placement

logger = logging.getLogger(__name__)

_NAMED = 10

SMOOTH = frozenset(("Celu", "Elu", "Gelu", "HardSwish", "Mish", "Mul", "Swish"))
"""Operators whose outputs may lie nearly all on one side of zero; `x * sigmoid(x)` and GELU in steps end in a Mul. A ReLU is not
one of them: runtimes compute it inside the layer before, together with the rounding."""

LOPSIDED = 0.35
"""A shift is worth it if the numbers below zero reach at most this share of those above: then the range shrinks by a third."""


class Scales(NamedTuple):
    """The scale of every tensor for the layers that read it, and, where there are any, those in a Concat and the shifts.

    What they are: `deploy.precision.int8.rewrite.ToInt8`.
    """

    own: dict[str, float]
    joint: dict[str, float]
    shifts: dict[str, float]


def scales_of(model: ir.Model, placement: Placement, histograms: Mapping[str, Histogram], ranges: Mapping[str, float]) -> Scales:
    """ranges: the largest magnitude to hold, by tensor.

    Within a group, all tensors have the scale of the widest, unless their own is less than half of it: then a bit would be lost.
    """
    amax = dict(ranges)
    branches = {name for name, uses in placement.edges.items() if any(node in placement.joints for node, _ in uses)}
    joint: dict[str, float] = {}
    for group in placement.groups:
        widest = max(amax[name] for name in group)
        for name in group:
            if amax[name] >= widest / 2 or name in placement.joints.values():
                amax[name] = widest
            elif name in branches:
                joint[name] = scale_of(widest)
    shifts: dict[str, float] = {}
    for name in _may_shift(model, placement):
        low, high = histograms[name].low, amax[name]
        if high > 0 and low >= -LOPSIDED * high:
            low = min(low, 0.0)
            shifts[name], amax[name] = (low + high) / 2, (high - low) / 2
    if dead := [name for name, value in amax.items() if value == 0]:
        logger.warning("always 0 on the calibration data: %s", ", ".join(dead[:_NAMED]) + ("..." if len(dead) > _NAMED else ""))
    return Scales({name: scale_of(value) for name, value in amax.items()}, joint, shifts)


def _may_shift(model: ir.Model, placement: Placement) -> list[str]:
    """Tensors behind a smooth activation that only layers with a matrix read: padding with zeros would know nothing of a shift."""
    nodes = {node.name or "": node for node in model.graph.all_nodes()}
    makers = {value.name: node for node in nodes.values() for value in node.outputs}
    grouped = {name for group in placement.groups for name in group}

    def with_matrix(name: str, index: int) -> bool:
        node = nodes[name]
        weight = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        return index == 0 and node.op_type in ("Gemm", "MatMul") and weight is not None and len(weight.shape) == 2

    return [
        tensor
        for tensor, uses in placement.edges.items()
        if tensor not in grouped
        and (maker := makers.get(tensor)) is not None
        and maker.domain in STANDARD
        and maker.op_type in SMOOTH
        and all(name in placement.weights and with_matrix(name, index) for name, index in uses)
    ]
