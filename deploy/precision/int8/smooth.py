"""The pass that evens out the channels of activations, so that one scale for all of them loses little.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023,
arXiv:2211.10438 (the scales); Wei et al., "Outlier Suppression+", EMNLP 2023, arXiv:2304.09145 (the shifts).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from deploy.precision.int8.absorb import absorber_of
from deploy.precision.int8.edit import GraphEdit
from deploy.precision.int8.placement import Placement
from deploy.precision.passes import PREPARED, VALID, PrecisionPass


@dataclass(frozen=True, kw_only=True)
class Channels:
    """What is taken off an activation before it is quantized, and what the rest is divided by.

    shift, scale: float32 (channels,), for each index of the last axis, of what a convolution reads of the second. scale is positive.
    """

    shift: np.ndarray
    scale: np.ndarray


class Smooth(PrecisionPass):
    """The same computation with activations that are easier to quantize: for every layer y = x W + b that reads `channels` x

        y = ((x - shift) / scale) (scale W) + (b + shift W)

    A convolution of 1x1 without padding is such a layer at every place of a map.

    The norm that makes x absorbs shift and scale, and so does the layer that makes the values of the attention that x is the result of,
    if nothing but these layers reads x (`deploy.precision.int8.absorb`). Otherwise a Mul and a Sub stand on the way to these layers
    alone, with the outputs `<tensor>_scaled` and `<tensor>_shifted`. All of them may be in branches of If; the nodes stand where x
    is made, and new weights in the main graph.

    placement: of the graph as it is before the pass; afterwards, `place` finds other tensors.
    """

    needs = PREPARED
    leaves = (*PREPARED, VALID)

    def __init__(self, placement: Placement, channels: Mapping[str, Channels]) -> None:
        self.placement = placement
        self.channels = channels

    def call(self, model: ir.Model) -> PassResult:
        edit = GraphEdit(model.graph)
        for tensor, channels in self.channels.items():
            readers = [edit.nodes[name] for name, _ in self.placement.edges[tensor]]
            _into_layers(edit, readers, channels)
            value = edit.values[tensor]
            absorber = absorber_of(value, readers, self.placement)
            if absorber is not None and (absorber.shifts or not channels.shift.any()):
                absorber.absorb(edit, channels.shift, channels.scale)
            else:
                _before_layers(edit, value, readers, channels)
        return PassResult(model, bool(self.channels))


def input_axis(node: ir.Node) -> int:
    """The axis of the inputs in the weight of a layer: 0 or 1."""
    return int(node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0))


def matrix_of(node: ir.Node) -> np.ndarray:
    """The weight of a layer as (inputs, outputs)."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    matrix = array.reshape(array.shape[:2])
    return matrix.T if input_axis(node) else matrix


def is_pointwise(node: ir.Node) -> bool:
    """Whether a node with a constant weight is a convolution with a matrix at every place: of 1x1, without padding or groups."""
    weight = node.inputs[1].const_value if node.op_type == "Conv" and node.inputs[1] is not None else None
    if weight is None or set(weight.shape.numpy()[2:]) != {1} or node.attributes.get_int("group", 1) != 1:
        return False
    return not any(node.attributes.get_ints("pads", ())) and "SAME" not in node.attributes.get_string("auto_pad", "NOTSET")


def _into_layers(edit: GraphEdit, readers: list[ir.Node], channels: Channels) -> None:
    """Multiply the rows of the weights by the scales, and add what the shifts make to the biases."""
    scaled: dict[ir.Value, ir.Value] = {}
    for node in readers:
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        array = weight.const_value.numpy()
        if channels.shift.any():
            edit.add_bias(node.name or "", (channels.shift.astype(np.float64) @ matrix_of(node)).astype(np.float32))
        if weight not in scaled:
            along = np.expand_dims(channels.scale, tuple(range(1, array.ndim - input_axis(node))))
            scaled[weight] = edit.initializer(f"{weight.name}_smoothed", array * along)
        node.replace_input_with(1, scaled[weight])
    for weight in scaled:
        edit.drop(weight)


def _before_layers(edit: GraphEdit, value: ir.Value, readers: list[ir.Node], channels: Channels) -> None:
    """Put a Mul and a Sub between `value` and `readers`."""
    added: list[ir.Node] = []
    weight = readers[0].inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    places = len(weight.const_value.shape) - 2 if readers[0].op_type == "Conv" else 0  # axes behind that of the channels
    for op, what, array, wanted in (
        ("Mul", "scaled", 1 / channels.scale, bool((channels.scale != 1).any())),
        ("Sub", "shifted", channels.shift / channels.scale, bool(channels.shift.any())),
    ):
        if wanted:
            alike = (array == array[0]).all()
            constant = edit.initializer(f"{value.name}_{what}_by", array[0] if alike else array.reshape(-1, *[1] * places))
            before = added[-1].outputs[0] if added else value
            result = edit.value(f"{value.name}_{what}", value, ir.DataType.FLOAT)
            added.append(edit.node(op, [before, constant], f"{value.name}_{what}", result))
    edit.insert_behind(value, added)
    for node in readers:
        node.replace_input_with(0, added[-1].outputs[0])
