"""What makes an activation and can absorb its shift and scale, so that no node is added: a norm, or the values of attention."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from deploy.precision.graph import STANDARD
from deploy.precision.int8.attention import Columns, columns_of
from deploy.precision.int8.edit import GraphEdit, bias_place
from deploy.precision.int8.placement import Placement

_NORMS = ("LayerNormalization", "RMSNormalization")
_SCALE, _SHIFT = 1, 2


class Absorber(Protocol):
    """shifts: whether it can absorb a shift too. in_weight: the scale goes into a weight, whose columns have other ranges then."""

    @property
    def shifts(self) -> bool: ...

    @property
    def in_weight(self) -> bool: ...

    def absorb(self, edit: GraphEdit, shift: np.ndarray, scale: np.ndarray) -> None:
        """Make (x - shift) / scale of what was x. shift, scale: float32 (channels,); shift is 0 where `shifts` is False."""


def absorber_of(value: ir.Value, readers: list[ir.Node], placement: Placement) -> Absorber | None:
    """What can absorb a shift and a scale of each channel of `value`, if nothing but `readers` reads that; else None."""
    if not reads_all(value, readers) or any(node.op_type == "Conv" for node in readers):
        return None
    if places := norm_of(value):
        return _Norm(tuple(places))
    columns = columns_of(value)
    return _Values(columns) if columns is not None and columns.product.name not in placement.nodes else None


def reads_all(value: ir.Value, readers: list[ir.Node]) -> bool:
    """Whether nothing but `readers` reads `value`."""
    return not value.is_graph_output() and all(node in readers for node, _ in value.uses())


@dataclass(frozen=True)
class _Norm:
    """places: the nodes and the inputs of them that hold the scale, and then the shift."""

    places: tuple[tuple[ir.Node, int], ...]

    @property
    def shifts(self) -> bool:
        return len(self.places) > 1

    @property
    def in_weight(self) -> bool:
        return False

    def absorb(self, edit: GraphEdit, shift: np.ndarray, scale: np.ndarray) -> None:
        for (node, index), off in zip(self.places, (np.zeros_like(shift), shift), strict=False):
            old = node.inputs[index] if len(node.inputs) > index else None
            array = old.const_value.numpy() if old is not None and old.const_value is not None else np.zeros_like(shift)
            if old is None:
                node.resize_inputs(index + 1)
            name = old.name if old is not None else f"{node.name}/shift"
            node.replace_input_with(index, edit.initializer(f"{name}_smoothed", (array - off) / scale))
            if old is not None:
                edit.drop(old)


@dataclass(frozen=True)
class _Values:
    """The columns of the layer that makes the values: attention is linear in them, and its probabilities add up to 1."""

    columns: Columns

    @property
    def shifts(self) -> bool:
        return self.columns.means

    @property
    def in_weight(self) -> bool:
        return True

    def absorb(self, edit: GraphEdit, shift: np.ndarray, scale: np.ndarray) -> None:
        node, channels = self.columns.layer, self.columns.channels
        mine = channels >= 0
        by, off = np.ones(len(channels), np.float32), np.zeros(len(channels), np.float32)
        by[mine], off[mine] = scale[channels[mine]], shift[channels[mine]]
        if off.any():
            edit.add_bias(node.name or "", -off)
        along = by[:, None] if node.attributes.get_int("transB", 0) else by
        _divide(edit, node, 1, along)
        if (place := bias_place(node)) is not None:
            _divide(edit, *place, by)


def _divide(edit: GraphEdit, node: ir.Node, index: int, by: np.ndarray) -> None:
    old = node.inputs[index]
    assert old is not None
    assert old.const_value is not None
    node.replace_input_with(index, edit.initializer(f"{old.name}_smoothed", old.const_value.numpy() / by))
    edit.drop(old)


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
