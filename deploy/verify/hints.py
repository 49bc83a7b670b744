"""What would help the culprits, where that is known."""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from deploy.precision.half.keep import weight_problem
from deploy.precision.half.options import EPSILON, LARGEST, HalfPrecision
from deploy.precision.half.plan import round_to
from deploy.verify.error import BEYOND
from deploy.verify.graphs import dequantized
from deploy.verify.measure import Comparison, Layer

_LARGEST = LARGEST["fp16"]
_SMALLEST = 2.0**-14
"""The smallest normal number of FP16; below it, 2^-24 is the step."""


def hints(comparison: Comparison, layers: Sequence[Layer]) -> dict[str, str]:
    """A sentence for each culprit by its tensor, "" where nothing is known. Raises PrecisionError where A cannot be run."""
    b = comparison.b
    quantized = {node.name for node in b.model.graph if any(dequantized(node, index) for index in range(len(node.inputs)))}
    known = {
        layer.tensor: f"deploy quantize --exclude '{layer.node}' leaves it in floating point" if layer.node in quantized else ""
        for layer in layers
    }
    of_fp16 = {layer.tensor: layer for layer in layers if b.halves.get(layer.tensor) == "fp16"}
    for name, array in comparison.exact(of_fp16):
        known[name] = _overflow(of_fp16[name]) or _small("values", array) or _small_weights(comparison.a.model, name)
    return known


def _overflow(layer: Layer) -> str:
    largest = layer.range.amax if layer.range else 0.0
    if largest > _LARGEST:
        return (
            f"its values reach {largest:.3g}, and FP16 ends at {_LARGEST:g}: `deploy convert --data` with such input keeps it in"
            " FP32, or --bf16"
        )
    if not math.isfinite(layer.local.error):
        return f"B's values pass {_LARGEST:g}, where FP16 ends, and A's reach {largest:.3g}: look at B's weights"
    return ""


def _small_weights(model: ir.Model, tensor: str) -> str:
    node = next(node for node in model.graph if tensor in (value.name for value in node.outputs))
    weights = [value.const_value.numpy() for value in node.inputs if value is not None and value.const_value is not None]
    return next((said for array in weights if array.dtype == np.float32 and (said := _small("weights", array))), "")


def _small(what: str, array: np.ndarray) -> str:
    """Said of numbers so small that FP16 rounds them by more than it rounds others."""
    lost = _lost(array, "fp16")
    if lost <= BEYOND * EPSILON["fp16"] / math.sqrt(3):  # of errors spread evenly up to the largest
        return ""
    share = float(np.mean(np.abs(array[array != 0]) < _SMALLEST))
    advice = ""
    if weight_problem(array, "fp16"):
        advice = ": `deploy convert --fp16` keeps such a layer in FP32"
    elif _lost(array, "bf16") < lost:
        advice = ": --bf16 rounds them less"
    return f"{share:.0%} of its {what} are below {_SMALLEST:.2g}, where FP16 has few bits left{advice}"


def _lost(array: np.ndarray, precision: HalfPrecision) -> float:
    """The relative error of rounding, in the root mean square; 0 where that is not finite."""
    values = array[np.isfinite(array)].astype(np.float64)
    off = round_to(array[np.isfinite(array)], precision).astype(np.float64) - values
    whole = float(np.linalg.norm(values))
    lost = float(np.linalg.norm(off)) / whole if whole else 0.0
    return lost if math.isfinite(lost) else 0.0
