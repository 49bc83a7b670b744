"""The form of an INT8 graph that ONNX Runtime's kernels for the CPU are made for: codes from one layer to the next.

It holds the weights, scales and corrections of the signed graph, and further pairs behind layers, sums and products.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from deploy.artifact.onnxfile import load_model, save_model
from deploy.artifact.tensors import Feed
from deploy.calibration.histogram import Histogram
from deploy.calibration.thresholds import threshold
from deploy.errors import ParityError
from deploy.host.memory import trim
from deploy.precision.codes import INT8
from deploy.precision.int8.cache import Calibrated, CpuRanges
from deploy.precision.int8.cpu_placement import MeansToPools, widened
from deploy.precision.int8.histograms import Activations, collect
from deploy.precision.int8.placement import Placement
from deploy.precision.int8.rewrite import ToCodes
from deploy.precision.int8.stored import Stored
from deploy.precision.int8.unshift import Unshift
from deploy.precision.int8.unsigned import ToUnsigned, parameters_of, restore_biases


def cpu_ranges(
    model: ir.Model,
    placement: Placement,
    histograms: Mapping[str, Histogram],
    scales: Mapping[str, float],
    feeds: Sequence[Feed],
    *,
    per_tensor: bool,
) -> CpuRanges:
    """Measure, on `feeds`, the tensors that have a pair in the CPU form alone, and take their least squared error for a range.

    model: prepared, FP32, unchanged. placement, histograms, scales: of the signed graph. Raises PrecisionError.
    """
    seen = {name: each.low if math.isfinite(each.low) else 0.0 for name, each in histograms.items()}
    model, unshift, wide = _widened(model, placement, scales, seen, per_tensor=per_tensor)
    scales, placement = unshift.scales, unshift.placement
    names = [tensor for tensor in wide.edges if tensor not in placement.edges]
    trim()
    measured = collect(Activations(model, names), feeds) if names else {}
    # Others are in a branch that did not run.
    further = {name: histogram for name, histogram in measured.items() if histogram.total}
    found = {name: INT8.scale_of(threshold(each, "mse")) for name, each in further.items()}
    lows = unshift.lows | {name: each.low if math.isfinite(each.low) else 0.0 for name, each in further.items()}
    groups = ([name for name in group if name in lows] for group in wide.groups)
    for group in filter(None, groups):  # numbers that only move between them
        known = [scales[name] for name in group if name in scales] or [found[name] for name in group]
        found |= dict.fromkeys((name for name in group if name in further), max(known))
        lows |= dict.fromkeys(group, min(lows[name] for name in group))
    return CpuRanges(scales=found, lows={name: lows[name] for name in wide.edges if name in lows})


@dataclass(frozen=True)
class CpuForm:
    """The model, and what its file must hold: what is `stored`, but with `chosen` scales and zero points (see `ToUnsigned`)."""

    model: ir.Model
    stored: Stored
    chosen: Mapping[str, tuple[float, int]]

    def save(self, path: Path) -> None:
        """Write the ONNX file, with large weights beside it. Raises OSError, and ParityError if it does not hold what it must."""
        save_model(self.model, path)
        nodes = {node.name or "": node for node in load_model(path).graph.all_nodes()}
        self.stored.check_weights(nodes)
        for tensor, uses in self.stored.edges.items():
            for name, index in uses:
                codes, *found = parameters_of(nodes[name].inputs[index])
                if tuple(found) != self.chosen.get(codes):
                    raise ParityError(
                        f"scale and zero point of {tensor!r} in the written file, where {name!r} reads it, are {found}; calibration"
                        f" gave {self.chosen.get(codes)}"
                    )

    def unrounded(self, path: Path) -> ir.Model:
        """The model of the file without what INT8 rounds, biases aside; it computes what the source does."""
        model = load_model(path)
        restore_biases(model)
        self.stored.unround(model)
        return model


def cpu_form(model: ir.Model, placement: Placement, known: Calibrated, *, per_tensor: bool) -> CpuForm:
    """The CPU form of a prepared FP32 `model`, which is not changed, by the calibration of its signed graph. Raises PrecisionError.

    model: smoothed, as it was calibrated. placement: of the signed graph.
    """
    model, unshift, wide = _widened(model, placement, known.scales, {}, per_tensor=per_tensor)
    scales = {**known.cpu.scales, **unshift.scales}
    wide = replace(wide, edges={name: uses for name, uses in wide.edges.items() if name in scales})
    bias = {name: correction for name, correction in known.bias.items() if name in wide.nodes}
    shifted = {name: correction for name, correction in unshift.bias.items() if name in wide.nodes}
    bias |= {name: bias.get(name, 0) + correction for name, correction in shifted.items()}
    stored = Stored.of(model, wide, scales, known.joint, bias, INT8)
    ToCodes(wide, scales, INT8, joint=known.joint, bias=bias, per_tensor=per_tensor)(model)
    to_unsigned = ToUnsigned(known.cpu.lows)
    to_unsigned(model)
    return CpuForm(model, stored, to_unsigned.chosen)


def _widened(
    model: ir.Model, placement: Placement, scales: Mapping[str, float], lows: Mapping[str, float], *, per_tensor: bool
) -> tuple[ir.Model, Unshift, Placement]:
    """A copy of `model` as the form has it, what has become of the shifts before convolutions, and where its pairs go."""
    model = model.clone()
    unshift = Unshift(placement, scales, lows, per_tensor=per_tensor)
    unshift(model)
    MeansToPools()(model)
    return model, unshift, widened(model, unshift.placement)
