"""The pass that evens out the channels of activations, so that one scale for all of them loses little.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023,
arXiv:2211.10438 (the scales); Wei et al., "Outlier Suppression+", EMNLP 2023, arXiv:2304.09145 (the shifts).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from deploy.precision.graph import STANDARD
from deploy.precision.int8.edit import GraphEdit
from deploy.precision.int8.placement import Placement
from deploy.precision.passes import PREPARED, VALID, PrecisionPass

_NORMS = ("LayerNormalization", "RMSNormalization")
_SCALE, _SHIFT = 1, 2


@dataclass(frozen=True, kw_only=True)
class Channels:
    """What is taken off an activation before it is quantized, and what the rest is divided by.

    shift, scale: float32 (channels,), for each index of the last axis. scale is positive.
    """

    shift: np.ndarray
    scale: np.ndarray


class Smooth(PrecisionPass):
    """The same computation with activations that are easier to quantize: for every layer y = x W + b that reads `channels` x

        y = ((x - shift) / scale) (scale W) + (b + shift W)

    The norm that makes x takes shift and scale into its own parameters, if nothing but these layers reads x. Otherwise a Mul and a
    Sub stand on the way to these layers alone, with the outputs `<tensor>_scaled` and `<tensor>_shifted`. All of them may be in
    branches of If; the nodes stand where x is made, and new weights in the main graph.

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
            if not _into_norm(edit, value, channels, alone=reads_all(value, readers)):
                _before_layers(edit, value, readers, channels)
        return PassResult(model, bool(self.channels))


def reads_all(value: ir.Value, readers: list[ir.Node]) -> bool:
    """Whether nothing but `readers` reads `value`."""
    return not value.is_graph_output() and all(node in readers for node, _ in value.uses())


def norm_of(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The nodes and the inputs of them that hold the constant scale, and then the shift, of the norm that makes `value`.

    A norm in steps ends in a Mul and an Add; Reshape and Transpose may follow that leave the channels last. Empty, or the shift
    alone, or the scale alone, if there is no more.
    """
    while (before := _before_moved(value)) is not None and len(before.uses()) == 1 and not before.is_graph_output():
        value = before
    node = value.producer()
    if node is None or node.domain not in STANDARD:
        return []
    if node.op_type in _NORMS:
        last = node.attributes.get_int("axis", -1) in (-1, len(value.shape or ()) - 1)
        if not last or not _is_vector(node.inputs[_SCALE]):
            return []
        bias = node.inputs[_SHIFT] if len(node.inputs) > _SHIFT else None
        whole = node.op_type == "LayerNormalization" and (bias is None or _is_vector(bias))
        return [(node, _SCALE), (node, _SHIFT)] if whole else [(node, _SCALE)]
    place = _vector_of(node)
    if node.op_type == "Mul" and place is not None:
        return [(node, place)]
    if node.op_type == "Add" and place is not None:
        before = node.inputs[1 - place]
        maker = before.producer() if before is not None else None
        if before is not None and maker is not None and len(before.uses()) == 1 and not before.is_graph_output():
            inner = _vector_of(maker)
            if maker.op_type == "Mul" and maker.domain in STANDARD and inner is not None:
                return [(maker, inner), (node, place)]
    return []


def _before_moved(value: ir.Value) -> ir.Value | None:
    """What a Reshape or Transpose made `value` of, if the vectors along the last axis are the same; else None."""
    node = value.producer()
    before = node.inputs[0] if node is not None and node.op_type in ("Reshape", "Transpose") else None
    if node is None or before is None or node.domain not in STANDARD or before.shape is None or value.shape is None:
        return None
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", tuple(reversed(range(len(before.shape)))))
        return before if order[-1] == len(order) - 1 else None
    sizes = [shape[-1] if len(shape) else None for shape in (before.shape, value.shape)]
    return before if isinstance(sizes[0], int) and sizes[0] == sizes[1] else None


def _vector_of(node: ir.Node) -> int | None:
    found = [index for index, value in enumerate(node.inputs) if _is_vector(value)]
    return found[0] if len(found) == 1 and len(node.inputs) == 2 else None


def _is_vector(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None and len(value.const_value.shape) == 1


def _into_layers(edit: GraphEdit, readers: list[ir.Node], channels: Channels) -> None:
    """Multiply the rows of the weights by the scales, and add what the shifts make to the biases."""
    scaled: dict[ir.Value, ir.Value] = {}
    for node in readers:
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        array = weight.const_value.numpy()
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0
        if channels.shift.any():
            matrix = array.T if transposed else array
            edit.add_bias(node.name or "", (channels.shift.astype(np.float64) @ matrix).astype(np.float32))
        if weight not in scaled:
            along = channels.scale if transposed else channels.scale[:, None]
            scaled[weight] = edit.initializer(f"{weight.name}_smoothed", array * along)
        node.replace_input_with(1, scaled[weight])
    for weight in scaled:
        edit.drop(weight)


def _into_norm(edit: GraphEdit, value: ir.Value, channels: Channels, *, alone: bool) -> bool:
    """Divide the parameters of the norm before; returns whether that was possible."""
    places = norm_of(value) if alone else []
    if not places or (len(places) == 1 and channels.shift.any()):
        return False
    for (node, index), off in zip(places, (np.zeros_like(channels.shift), channels.shift), strict=False):
        old = node.inputs[index] if len(node.inputs) > index else None
        array = old.const_value.numpy() if old is not None and old.const_value is not None else np.zeros_like(channels.shift)
        if old is None:
            node.resize_inputs(index + 1)
        name = old.name if old is not None else f"{node.name}/shift"
        node.replace_input_with(index, edit.initializer(f"{name}_smoothed", (array - off) / channels.scale))
        if old is not None:
            edit.drop(old)
    return True


def _before_layers(edit: GraphEdit, value: ir.Value, readers: list[ir.Node], channels: Channels) -> None:
    """Put a Mul and a Sub between `value` and `readers`."""
    added: list[ir.Node] = []
    for op, what, array, wanted in (
        ("Mul", "scaled", 1 / channels.scale, bool((channels.scale != 1).any())),
        ("Sub", "shifted", channels.shift / channels.scale, bool(channels.shift.any())),
    ):
        if wanted:
            constant = edit.initializer(f"{value.name}_{what}_by", array)
            before = added[-1].outputs[0] if added else value
            result = edit.value(f"{value.name}_{what}", value, ir.DataType.FLOAT)
            added.append(edit.node(op, [before, constant], f"{value.name}_{what}", result))
    edit.insert_behind(value, added)
    for node in readers:
        node.replace_input_with(0, added[-1].outputs[0])
