"""Weights of 7 bits for processors that add products of bytes in 16 bits.

x86 without VNNI multiplies unsigned by signed bytes and adds each two products up in 16 bits, saturated (the instruction VPMADDUBSW). Two
products of codes up to 255 and 127 do not fit: of a ResNet-18, 17.6 dB of signal to noise are left of 30.5. Codes up to 64 do fit, for 2 * 255 * 64 < 2**15:
29.2 dB. NNCF halves the codes when it quantizes (`overflow_fix`), for all processors; here it is done where a file is opened, where it is needed.

Imported by `backends.openvino` alone, which keeps OpenVINO from starting its telemetry.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from openvino import opset13

_LAYERS = frozenset(("Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData", "MatMul"))
_RESHAPES = frozenset(("Reshape", "Squeeze", "Unsqueeze"))
_MOVES = _RESHAPES | {
    "AvgPool", "Broadcast", "Clamp", "Concat", "Interpolate", "MaxPool", "Pad", "Relu", "Slice", "Split", "StridedSlice", "Transpose",
    "VariadicSplit",
}  # fmt: skip
"""What OpenVINO computes on codes, or moves behind a layer, where a conversion from codes is before it."""
_MOST = 64
"""The largest code of which two products with 255 fit."""


def halve_weights(model: Any) -> int:
    """Halve the INT8 codes of the weights of all layers of an `openvino.Model` that multiply codes, and double their scales, in place; returns the
    number of weights.

    Those whose codes fit already stay, and those with a zero point other than 0.
    """
    products = list(_products(model))
    for product, codes, scale in products:
        halves = opset13.convert(opset13.constant(np.rint(codes / 2).astype(np.int8)), "f32")
        product.input(0).replace_source_output(halves.output(0))
        product.input(1).replace_source_output(opset13.constant(scale * scale.dtype.type(2)).output(0))
    return len(products)


def _products(model: Any) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Each product of a conversion of constant codes and a scale that a layer reads beside others, once, with the two."""
    seen: set[str] = set()
    for layer in model.get_ordered_ops():
        operands = [_behind(value, _MOVES) for value in layer.input_values()[:2]] if layer.get_type_name() in _LAYERS else []
        if not operands or not all(map(_is_dequantized, operands)):
            continue  # what reads floats is computed in floating point
        for product in operands:
            if product.get_friendly_name() in seen:
                continue
            seen.add(product.get_friendly_name())
            codes, scale = _codes(product.input_value(0)), _behind(product.input_value(1), _RESHAPES)
            if codes is not None and np.abs(codes.astype(np.int16)).max(initial=0) > _MOST and _is_constant(scale):
                yield product, codes, scale.data.reshape(product.input_value(1).get_shape())


def _is_dequantized(node: Any) -> bool:
    """Whether a node multiplies a conversion of bytes, less a zero point or not, by something."""
    if node.get_type_name() != "Multiply":
        return False
    source = _behind(node.input_value(0), frozenset(("Subtract",)))
    return source.get_type_name() == "Convert" and source.input_value(0).get_element_type().get_type_name() in ("i8", "u8")


def _codes(value: Any) -> np.ndarray | None:
    """The INT8 constant that `value` is in floating point, less a zero point of 0; None where it is not."""
    node = value.get_node()
    if node.get_type_name() == "Subtract":
        zero = _behind(node.input_value(1), _RESHAPES | {"Convert"})
        if not _is_constant(zero) or np.any(zero.data):
            return None
        node = node.input_value(0).get_node()
    source = node.input_value(0).get_node() if node.get_type_name() == "Convert" else node
    return source.data if _is_constant(source) and source.data.dtype == np.int8 else None


def _behind(value: Any, kinds: frozenset[str]) -> Any:
    """The node that makes `value`, before all nodes of these kinds."""
    node = value.get_node()
    while node.get_type_name() in kinds:
        node = node.input_value(0).get_node()
    return node


def _is_constant(node: Any) -> bool:
    return bool(node.get_type_name() == "Constant")
