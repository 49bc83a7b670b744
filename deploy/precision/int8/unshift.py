"""The pass that takes out the constants before convolutions, for unsigned codes, which have a zero point for that."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from deploy.precision.codes import INT8
from deploy.precision.int8.edit import GraphEdit, graph_of
from deploy.precision.int8.placement import Placement
from deploy.precision.int8.smooth import is_pointwise, matrix_of
from deploy.precision.passes import PREPARED, VALID, PrecisionPass


class Unshift(PrecisionPass):
    """The same computation without the numbers that `Smooth` takes off before convolutions: of Sub(x, shift), the readers read x.

    Where x lies above zero for the most part, unsigned codes of x are those of x - shift and a zero point, so that the rounded
    graphs compute the same, but for the last digit of the zero point.

    placement, scales: of the signed graph. After the call, `placement` is that of the changed graph; `scales` and `lows` have those
    of every x in addition, given the `lows` of what was taken out; and `bias` is what to add to that of a convolution, float32
    (output channels,), by node name, to correct what its rounded weights make of the shift.
    """

    needs = PREPARED
    leaves = (*PREPARED, VALID)

    def __init__(self, placement: Placement, scales: Mapping[str, float], lows: Mapping[str, float], *, per_tensor: bool) -> None:
        self.placement = placement
        self.scales = dict(scales)
        self.lows = dict(lows)
        self.per_tensor = per_tensor
        self.bias: dict[str, np.ndarray] = {}

    def call(self, model: ir.Model) -> PassResult:
        edit = GraphEdit(model.graph)
        edges = dict(self.placement.edges)
        for tensor, uses in self.placement.edges.items():
            readers = [edit.nodes[name] for name, _ in uses]
            value, shift = edit.values[tensor], _shift(edit.values[tensor])
            high = self.scales.get(tensor, 0.0) * INT8.largest
            if shift is None or not high > shift > 0 or not all(map(is_pointwise, readers)):
                continue
            sub = value.producer()
            assert sub is not None
            source = sub.inputs[0]
            assert source is not None
            for node in readers:
                self._into_bias(edit, node, shift)
                node.replace_input_with(0, source)
            name = source.name or ""
            if name not in edges:  # else it has codes of its own, which do as well
                self.scales[name] = (high + shift) / INT8.largest
                self.lows[name] = max(self.lows.get(tensor, -high), -high) + shift
            edges[name] = (*edges.get(name, ()), *edges.pop(tensor))
            if not value.uses() and not value.is_graph_output():
                graph_of(sub).remove(sub, safe=True)
        changed = edges.keys() != self.placement.edges.keys()
        order = {value: place for place, value in enumerate(edit.values)}
        self.placement = replace(self.placement, edges={name: edges[name] for name in sorted(edges, key=order.__getitem__)})
        return PassResult(model, changed)

    def _into_bias(self, edit: GraphEdit, node: ir.Node, shift: float) -> None:
        matrix = matrix_of(node).astype(np.float64)
        codes, scale = INT8.quantize_weight(matrix, None if self.per_tensor else 1)
        made, rounded = shift * matrix.sum(axis=0), shift * (codes.astype(np.float64) * scale).sum(axis=0)
        edit.add_bias(node.name or "", -made.astype(np.float32))
        self.bias[node.name or ""] = (made - rounded).astype(np.float32)


def _shift(value: ir.Value) -> float | None:
    """The number that a Sub takes off all others to make `value`; None where it is made in another way."""
    sub = value.producer()
    constant = sub.inputs[1] if sub is not None and sub.op_type == "Sub" and sub.domain == "" else None
    if constant is None or constant.const_value is None or constant.const_value.size != 1:
        return None
    return float(constant.const_value.numpy().reshape(()))
