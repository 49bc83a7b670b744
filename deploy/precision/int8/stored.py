"""That a quantized file holds the weights and scales that were computed, and without its rounding computes what its source does.

A fault in one of many layers may change the outputs less than the rounding itself does, so that comparing these does not show it.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploy.artifact.onnxfile import load_model
from deploy.errors import ParityError
from deploy.precision.codes import Codes
from deploy.precision.int8.edit import bias_place
from deploy.precision.int8.placement import Placement

_ZERO_POINT = 2

_STEPS = 0.6
"""How many steps, from one code to the next, a weight may be away from its own: rounding is half of one, and a scale in FP16 moves
the largest code of INT8 by a sixteenth."""

_SCALE_ERROR = 1e-3
"""The largest relative error of an activation's scale; that of FP16 is 2^-11."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a quantized file must hold.

    codes: of its weights and activations. weights: the FP32 weight of every layer with a quantized weight. edges: by quantized tensor, the inputs (node, index) that read it.
    scales: by quantized tensor. joint: those of branches of a Concat (`joints`) that have another one there. bias: what was added to the bias of a node, or to its output.
    """

    codes: Codes
    weights: Mapping[str, ir.TensorProtocol]
    edges: Mapping[str, tuple[tuple[str, int], ...]]
    scales: Mapping[str, float]
    joint: Mapping[str, float]
    joints: Collection[str]
    bias: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls,
        model: ir.Model,
        placement: Placement,
        scales: Mapping[str, float],
        joint: Mapping[str, float],
        bias: Mapping[str, np.ndarray],
        codes: Codes,
    ) -> "Stored":
        """model: prepared, before it is quantized."""
        tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
        weights = {node: tensors[weight.initializer] for node, weight in placement.weights.items()}
        return cls(
            codes=codes,
            weights={node: tensor for node, tensor in weights.items() if tensor is not None},
            edges=placement.edges,
            scales={tensor: scales[tensor] for tensor in placement.edges},
            joint=joint,
            joints=frozenset(placement.joints),
            bias=bias,
        )

    @property
    def size(self) -> int:
        """The bytes of the FP32 weights."""
        return sum(weight.nbytes for weight in self.weights.values())

    def check(self, path: Path) -> None:
        """Raise ParityError naming the layer if the ONNX file at `path` holds something else."""
        nodes = {node.name or "": node for node in load_model(path).graph.all_nodes()}
        for pair in nodes.values():
            if pair.op_type in ("QuantizeLinear", "DequantizeLinear") and len(pair.inputs) > _ZERO_POINT:
                zero = _constant(pair, _ZERO_POINT)
                if zero is not None and zero.astype(np.float32).any():
                    raise ParityError(f"the zero point of {pair.name!r} in the written file is not 0")
        self.check_weights(nodes)
        for tensor, uses in self.edges.items():
            for node, index in uses:
                scale = self.joint.get(tensor, self.scales[tensor]) if node in self.joints else self.scales[tensor]
                for found in _scales(_producer(nodes[node], index)):
                    if found.shape != () or not abs(found - scale) <= _SCALE_ERROR * scale:
                        raise ParityError(
                            f"the scale of {tensor!r} in the written file is {found}, where {node!r} reads it; calibration gave"
                            f" {scale:.6g}"
                        )

    def check_weights(self, nodes: Mapping[str, ir.Node]) -> None:
        """Raise ParityError naming the layer if one of the `nodes` of a file, by name, has another weight."""
        for node, weight in self.weights.items():
            if wrong := _weight_problem(_producer(nodes[node], 1), weight.numpy(), self.codes):
                raise ParityError(
                    f"the {self.codes.label} weight of {node!r} in the written file is not its FP32 weight: {wrong}"
                )

    def unround(self, model: ir.Model) -> None:
        """Undo in place what is rounded in the model of the file: weights are in floating point again, and pairs do nothing.

        What is left must compute what the source computes: all but the numbers that `check` looks at is compared so.
        """
        nodes = {node.name or "": node for node in model.graph.all_nodes()}
        for name, weight in self.weights.items():
            _replace(model.graph, nodes[name], 1, weight.numpy())
        for name, shift in self.bias.items():
            node, index = bias_place(nodes[name]) or (nodes[f"{name}/bias_correction"], 1)
            if (old := _constant(node, index)) is not None:
                _replace(model.graph, node, index, old.astype(np.float32) - shift)
        for node in nodes.values():
            value, result = node.inputs[0] if node.inputs else None, node.outputs[0]
            if value is None or (value.is_initializer() and node.op_type != "Concat"):
                continue
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                node.op_type = "Identity"
                node.resize_inputs(1)
                node.attributes.clear()
                result.type = value.type
            elif result.dtype in (self.codes.dtype, ir.DataType.UINT8):  # it joins codes
                result.type = value.type
        RemoveUnusedNodesPass()(model)  # ONNX Runtime would compute the quantized weights beside these


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> None:
    """Make `array`, in the type that it is read in, input `index` of `node`."""
    old = node.inputs[index]
    assert old is not None
    assert old.dtype is not None
    name = f"{node.name}/unrounded_{index}"
    tensor = ir.tensor(array.astype(old.dtype.numpy(), copy=False), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    node.replace_input_with(index, value)


def _producer(node: ir.Node, index: int) -> ir.Node | None:
    """The node that makes an input, behind Casts between number formats."""
    value = node.inputs[index]
    maker = value.producer() if value is not None else None
    while maker is not None and maker.op_type == "Cast":
        value = maker.inputs[0]
        maker = value.producer() if value is not None else None
    return maker


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index]
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _weight_problem(dequantize: ir.Node | None, weight: np.ndarray, codes: Codes) -> str:
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return "it is not quantized"
    stored, scale = _constant(dequantize, 0), _constant(dequantize, 1)
    if stored is None or scale is None or stored.shape != weight.shape or stored.dtype != codes.dtype.numpy():
        return "its codes or scales are not there"
    axis = dequantize.attributes.get_int("axis", 1)
    steps = scale.astype(np.float32)
    if steps.ndim:
        steps = np.expand_dims(steps, tuple(other for other in range(weight.ndim) if other != axis % weight.ndim))
    found = stored.astype(np.float32)
    off = float((np.abs(found * steps - weight) / (steps * codes.spacing(found))).max(initial=0.0))
    return "" if off <= _STEPS else f"it is off by {off:.3g} steps of its codes"


def _scales(maker: ir.Node | None) -> Iterator[np.ndarray]:
    """The scales of the pair, or the QuantizeLinear alone, that makes a tensor."""
    while maker is not None and maker.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scale = _constant(maker, 1)
        if scale is not None:
            yield scale.astype(np.float64)
        maker = _producer(maker, 0) if maker.op_type == "DequantizeLinear" else None
