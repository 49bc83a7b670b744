"""How much of a network is quantized, and that it is enough."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from deploy.errors import PrecisionError
from deploy.precision.codes import CodesName
from deploy.precision.int8.placement import Placement, Selection, place
from deploy.precision.int8.rules import WEIGHTED
from deploy.precision.macs import count_in_branches, count_macs

_NAMED = 3


def asked_of(model: ir.Model, selection: Selection) -> set[str]:
    """The layers that would be quantized if `selection` left nothing in floating point."""
    everything = replace(selection, exclude=(), float_first=False, float_last=False)
    return set(place(model, everything).nodes) - set(place(model, selection).nodes)


def layer_macs(model: ir.Model, feed: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The multiply-accumulates of each Conv, ConvTranspose, Gemm and MatMul with weights of an FP32 model, by name, where they can be counted.

    feed: one that it runs on; the counts are for its shapes. Layers in the branches of If count once, whichever branch runs; those in loops do
    not, as how often they run depends on the data.
    """
    shapes = {name: array.shape for name, array in feed.items()}
    macs = count_macs(model, shapes) | count_in_branches(model, shapes)
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        weight = node.inputs[1] if node.op_type in WEIGHTED and len(node.inputs) > 1 else None
        if weight is not None and weight.is_initializer() and (count := macs.get(node.name or "")):
            counts[node.name or ""] = count
    return counts


def quantized_share(
    counts: Mapping[str, int], placement: Placement, *, codes: CodesName, asked: Collection[str], least: float
) -> float | None:
    """The share, 0 to 1, of the multiply-accumulates of layers with weights that `placement` quantizes to `codes`.

    counts: as of `layer_macs`; the share of none is None. asked: nodes that are not held against it, as the user left them in floating point.
    Raises PrecisionError where, of the others, less than `least` is quantized.
    """
    if not counts:
        return None
    done = sum(count for name, count in counts.items() if name in placement.weights)
    wanted = sum(count for name, count in counts.items() if name not in asked)
    if done < least * wanted:
        reasons = {each.node: each.reason for each in placement.excluded}
        left = sorted((name for name in counts if name in reasons and name not in asked), key=counts.__getitem__, reverse=True)
        shown = "; ".join(f"{name}: {reasons[name]}" for name in left[:_NAMED])
        raise PrecisionError(
            f"{codes.upper()} would be {done / wanted:.0%} of the multiply-accumulates of layers with weights; at least {least:.0%} are asked"
            f" for (`min_share`). Left in floating point: {shown}{'; ...' if len(left) > _NAMED else ''}"
        )
    return done / sum(counts.values())
