"""Codes as the kernels of OpenVINO for the CPU want them: Q/DQ graphs are changed where a file is opened.

Activations without negative numbers are unsigned (`unsign`). The kernels multiply unsigned by signed bytes: signed activations cost them a
correction, and layers on vectors a slow path. For x86 alone: others multiply signed bytes. On a ResNet-18 at 32x32, without VNNI, INT8 is 1.9
times as fast as FP32 so, and 1.45 times with signed codes.

Weights have 7 bits where products of bytes are added in 16 (`halve_weights`). x86 without VNNI adds each two products up in 16 bits, saturated (the
instruction VPMADDUBSW). Two products of codes up to 255 and 127 do not fit: of that ResNet-18, 17.6 dB of signal to noise are left of 30.5. Codes up to 64
do fit, for 2 * 255 * 64 < 2**15. NNCF halves the codes when it quantizes (`overflow_fix`), for all processors; here it is done where it is needed.

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

_MAKE_POSITIVE = frozenset(("Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "SoftPlus", "Softmax", "Sqrt"))
_KEEP_SIGN = {
    "Add": None, "AvgPool": 1, "Broadcast": 1, "Concat": None, "Divide": None, "Gather": 1, "MaxPool": 1, "Minimum": None,
    "Multiply": None, "ReduceMax": 1, "ReduceMean": 1, "ReduceSum": 1, "Reshape": 1, "Slice": 1, "Split": 1, "Squeeze": 1, "StridedSlice": 1,
    "Tile": 1, "Transpose": 1, "Unsqueeze": 1, "VariadicSplit": 1,
}  # fmt: skip
"""Operators whose results have no negative number where none is in so many of the first inputs; None: in all."""
_SMALL = 4096
"""Elements of the largest constant that is looked at."""


def unsign(model: Any) -> int:
    """Let activations without negative numbers have unsigned codes, in place in an `openvino.Model`; returns the number of activations.

    The largest number stays the same, 127 steps of the file, and has 255 steps: what a file clips is clipped, and the rest is rounded more finely.
    """
    positive = _without_negatives(model)
    count = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or node.input_value(0).get_node().get_name() not in positive:
            continue
        readers = [target.get_node() for target in node.output(0).get_target_inputs()]
        products = [product for reader in readers for product in _dequantized(reader)]
        if not products or None in products or any(map(_is_second, products)) or not _is_signed(node):
            continue
        bounds = [value.get_node().data for value in node.input_values()[1:]]
        ends = (0 * bounds[0], bounds[1], 0 * bounds[2], 255 + 0 * bounds[3])
        codes = opset13.fake_quantize(node.input_value(0), *map(opset13.constant, ends), levels=256)
        codes.set_friendly_name(node.get_friendly_name())  # profiles say it
        for reader in readers:
            bytes_ = opset13.convert(codes, "u8").output(0)
            for target in reader.output(0).get_target_inputs():
                target.replace_source_output(bytes_)
        for product in products:
            scale = _behind(product.input_value(1), _RESHAPES).data.reshape(product.input_value(1).get_shape())
            product.input(1).replace_source_output(opset13.constant(scale * scale.dtype.type(127 / 255)).output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _is_second(value: Any) -> bool:
    """Whether a MatMul reads what a node makes as its second operand, which the kernels want signed."""
    readers = list(value.output(0).get_target_inputs())
    while readers:
        target = readers.pop()
        kind = target.get_node().get_type_name()
        if kind == "MatMul" and target.get_index() == 1:
            return True
        if kind in _MOVES:
            readers += [each for output in target.get_node().outputs() for each in output.get_target_inputs()]
    return False


def _is_signed(node: Any) -> bool:
    """Whether a FakeQuantize gives the codes -128 to 127, with 0 for 0."""
    ends = [value.get_node() for value in node.input_values()[1:]]
    if not all(map(_is_constant, ends)):
        return False
    low, high, least, most = (end.data.astype(np.float64) for end in ends)
    return bool(np.all(least == -128) and np.all(most == 127) and np.allclose(127 * low, -128 * high, rtol=1e-3, atol=0))


def _dequantized(codes: Any) -> list[Any]:
    """The products with a constant scale that all readers of a conversion to INT8 come to; None in it for any other reader."""
    if codes.get_type_name() != "Convert" or codes.output(0).get_element_type().get_type_name() != "i8":
        return [None]
    found: list[Any] = []
    readers = list(codes.output(0).get_target_inputs())
    while readers:
        target = readers.pop()
        node, place = target.get_node(), target.get_index()
        kind = node.get_type_name()
        if kind == "Multiply" and place == 0 and _is_constant(_behind(node.input_value(1), _RESHAPES)):
            found.append(node)
        elif (kind == "Convert" and node.output(0).get_element_type().is_real()) or (
            kind == "Subtract" and place == 0 and _takes_nothing(node)
        ):
            readers += node.output(0).get_target_inputs()
        else:
            found.append(None)
    return found


def _without_negatives(model: Any) -> set[str]:
    """The names of the nodes whose results have no negative number, whatever the inputs are."""
    found: set[str] = set()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        sources = [value.get_node().get_name() in found for value in node.input_values()]
        if kind == "Constant":
            good = 0 < node.data.size <= _SMALL and node.data.dtype.kind in "fiu" and bool(np.all(node.data >= 0))
        elif kind in _KEEP_SIGN:
            good = all(sources[: _KEEP_SIGN[kind]])
        elif kind == "Maximum":
            good = any(sources)
        elif kind == "Clamp":
            ends = node.get_attributes()
            good = ends["min"] >= 0 or (sources[0] and ends["max"] >= 0)
        elif kind == "Pad":  # the number that it puts around is its fourth input
            good = sources[0] and all(sources[3:])
        elif kind == "Subtract":
            good = sources[0] and _takes_nothing(node)
        elif kind == "FakeQuantize":
            good = sources[0] and (_is_signed(node) or node.input_value(3).get_node().get_name() in found)
        elif kind == "Convert":  # of floats to bytes, large ones become negative
            good = sources[0] and (
                node.output(0).get_element_type().is_real() or node.input_value(0).get_node().get_type_name() == "FakeQuantize"
            )
        else:
            good = kind in _MAKE_POSITIVE
        if good:
            found.add(node.get_name())
    return found


def _takes_nothing(node: Any) -> bool:
    """Whether a Subtract takes a zero point of 0 away."""
    zero = _behind(node.input_value(1), _RESHAPES | {"Convert"})
    return _is_constant(zero) and not np.any(zero.data)


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
            if product.get_name() in seen:
                continue
            seen.add(product.get_name())
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
        if not _takes_nothing(node):
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
