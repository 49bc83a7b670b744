"""The layer that makes the values of attention, found from what reads the result of attention.

Attention is linear in its values: dividing column i of the values, that is of the weight and the bias of the layer that makes them,
divides channel i of the result. Which column is which channel is followed through the Reshape and Transpose that split and join
heads, through the product with the probabilities, and through what takes the values out of queries, keys and values in one.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploy.precision.graph import STANDARD

_OTHERS = -1


@dataclass(frozen=True)
class Columns:
    """layer: a Gemm or a MatMul with a weight. channels: int64 (outputs,), the channel of the result that an output becomes, or -1.

    product: the MatMul of probabilities and values. means: the probabilities are those of a Softmax, so that each number of the
    result is a mean of values.
    """

    layer: ir.Node
    channels: np.ndarray
    product: ir.Node
    means: bool


def columns_of(value: ir.Value) -> Columns | None:
    """The columns of the layer whose outputs become the channels (last axis) of `value` through a product of attention alone.

    None where there is no such layer, where anything else reads its columns, and where sizes are not known: heads that share their
    values are none either.
    """
    shape = _sizes(value)
    if not shape or shape[-1] is None:
        return None
    walk = _Walk(value, (len(shape) - 1,), np.arange(shape[-1]))
    while walk.back():
        pass
    return walk.found()


@dataclass
class _Walk:
    """A tensor on the way back from the result, and which of its numbers become which channel.

    axes: of the tensor; channels: int64, a size for each of `axes`: the channel that numbers at these places become, or -1.
    """

    value: ir.Value
    axes: tuple[int, ...]
    channels: np.ndarray
    product: ir.Node | None = None

    def back(self) -> bool:
        """One step; False where it cannot be made."""
        node = self.value.producer()
        if node is None or node.domain not in STANDARD:
            return False
        steps = {
            "Gather": self._gather, "Identity": self._same, "MatMul": self._multiply, "Reshape": self._reshape, "Split": self._split,
            "Squeeze": self._squeeze, "Transpose": self._transpose,
        }  # fmt: skip
        step = steps.get(node.op_type)
        source = node.inputs[1 if node.op_type == "MatMul" else 0]
        if step is None or source is None or source.is_graph_output() or (len(source.uses()) > 1 and node.op_type != "Gather"):
            return False
        if not step(node, source):
            return False
        self.value = source
        return True

    def found(self) -> Columns | None:
        shape = _sizes(self.value)
        if self.product is None or self.axes != (len(shape) - 1,):
            return None
        layer, size = self.value.producer(), len(self.channels)
        if layer is not None and layer.op_type == "Add" and layer.domain in STANDARD:
            vectors = [each for each in layer.inputs if _constant_shape(each) == (size,)]
            others = [each for each in layer.inputs if each not in vectors]
            if len(vectors) != 1 or others[0] is None or len(others[0].uses()) != 1 or others[0].is_graph_output():
                return None
            layer = others[0].producer()
            if layer is None or layer.op_type != "MatMul":
                return None
        if layer is None or layer.op_type not in ("Gemm", "MatMul") or layer.domain not in STANDARD:
            return None
        weight, bias = _constant_shape(layer.inputs[1]), layer.inputs[2] if len(layer.inputs) > 2 else None
        transposed = layer.attributes.get_int("transB", 0) != 0
        if weight is None or len(weight) != 2 or weight[0 if transposed else 1] != size:
            return None
        if bias is not None and _constant_shape(bias) != (size,):
            return None
        maker = self.product.inputs[0].producer() if self.product.inputs[0] is not None else None
        return Columns(layer, self.channels, self.product, _adds_up(maker))

    def _same(self, node: ir.Node, source: ir.Value) -> bool:
        return True

    def _transpose(self, node: ir.Node, source: ir.Value) -> bool:
        order = node.attributes.get_ints("perm", tuple(reversed(range(len(_sizes(self.value))))))
        self.axes = tuple(order[axis] for axis in self.axes)
        return True

    def _reshape(self, node: ir.Node, source: ir.Value) -> bool:
        """The last axes of both are the same numbers in the same order, where their sizes make as many."""
        order = np.argsort(self.axes)
        axes, channels = tuple(self.axes[place] for place in order), self.channels.transpose(order)
        after, before = _sizes(self.value), _sizes(source)
        if not before or axes != tuple(range(len(after) - len(axes), len(after))):
            return False
        sizes: list[int] = []
        for size in reversed(before):
            if math.prod(sizes) >= channels.size or size is None:
                break
            sizes.insert(0, size)
        if math.prod(sizes) != channels.size:
            return False
        self.axes = tuple(range(len(before) - len(sizes), len(before)))
        self.channels = channels.reshape(sizes)
        return True

    def _multiply(self, node: ir.Node, source: ir.Value) -> bool:
        """Rows are mixed; each column, and each head, stays by itself."""
        rank, sizes = len(_sizes(self.value)), _sizes(source)
        axes = tuple(axis - rank + len(sizes) for axis in self.axes)
        same = all(axis >= 0 and sizes[axis] == size for axis, size in zip(axes, self.channels.shape, strict=True))
        if self.product is not None or not same or len(sizes) < 2 or len(sizes) - 2 in axes or len(sizes) - 1 not in axes:
            return False
        self.product, self.axes = node, axes
        return True

    def _squeeze(self, node: ir.Node, source: ir.Value) -> bool:
        gone = _numbers(node, 1)
        rank = len(_sizes(source))
        if gone is None or not rank:
            return False
        kept = [axis for axis in range(rank) if axis not in {each % rank for each in gone}]
        self.axes = tuple(kept[axis] for axis in self.axes)
        return True

    def _gather(self, node: ir.Node, source: ir.Value) -> bool:
        """One index of an axis; all that read the tensor must take others."""
        taken = [(user.op_type, user.attributes.get_int("axis", 0), _index(user)) for user, place in source.uses() if place == 0]
        axis, sizes, index = node.attributes.get_int("axis", 0), _sizes(source), _index(node)
        whole = len(taken) == len(source.uses())
        if (
            index is None
            or not sizes
            or not whole
            or len(set(taken)) < len(taken)
            or any(each[:2] != taken[0][:2] for each in taken)
        ):
            return False
        axis %= len(sizes)
        size = sizes[axis]
        if size is None or any(each is None or each < 0 for _, _, each in taken):
            return False
        self.axes = (axis, *(each + (each >= axis) for each in self.axes))
        channels = np.full((size, *self.channels.shape), _OTHERS)
        channels[index] = self.channels
        self.channels = channels
        return True

    def _split(self, node: ir.Node, source: ir.Value) -> bool:
        """One part of an axis; the others are other numbers."""
        sizes = _sizes(source)
        axis = node.attributes.get_int("axis", 0) % max(len(sizes), 1)
        parts = [_sizes(output)[axis] if _sizes(output) else None for output in node.outputs]
        if not sizes or any(part is None for part in parts):
            return False
        widths = [part for part in parts if part is not None]
        if axis not in self.axes:  # one index of an axis that a Squeeze removes
            self.axes, self.channels = (axis, *self.axes), self.channels[None]
        place = self.axes.index(axis)
        start = sum(widths[: node.outputs.index(self.value)])
        around = [(0, 0)] * self.channels.ndim
        around[place] = (start, sum(widths) - start - self.channels.shape[place])
        if self.channels.shape[place] != widths[node.outputs.index(self.value)]:
            return False
        self.channels = np.pad(self.channels, around, constant_values=_OTHERS)
        return True


def _adds_up(maker: ir.Node | None) -> bool:
    """Whether `maker` is a Softmax over the last axis."""
    if maker is None or maker.op_type != "Softmax" or maker.domain not in STANDARD:
        return False
    return maker.attributes.get_int("axis", -1) in (-1, len(_sizes(maker.outputs[0])) - 1)


def _sizes(value: ir.Value) -> tuple[int | None, ...]:
    """The shape, None for what is not known; () where even the rank is not."""
    return () if value.shape is None else tuple(size if isinstance(size, int) else None for size in value.shape)


def _constant_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return tuple(value.const_value.shape.numpy())


def _numbers(node: ir.Node, index: int) -> list[int] | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None or value.const_value is None else value.const_value.numpy().reshape(-1).tolist()


def _index(node: ir.Node) -> int | None:
    """The one index that a Gather takes, whose axis is gone then; None otherwise."""
    value = node.inputs[1] if node.op_type == "Gather" else None
    if value is None or value.const_value is None or value.const_value.shape.numpy():
        return None
    return int(value.const_value.numpy())
