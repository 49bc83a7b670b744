"""The pass that quantizes an FP32 graph: Q/DQ pairs around its layers, and weights stored as codes.

Quantization is symmetric: the zero point is 0.
"""

import functools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from deploy.errors import PrecisionError
from deploy.precision.codes import INT8, Codes
from deploy.precision.int8.edit import GraphEdit, graph_of
from deploy.precision.int8.options import OPSET
from deploy.precision.int8.placement import Placement
from deploy.precision.passes import PREPARED, VALID, Condition, PrecisionPass, opset_from

_BIAS_CODES = 2.0**29
"""ONNX Runtime stores a bias in 32 bits, at the product of the scales of input and weight; unsigned activations may have steps of half
the size, and the sum of products comes on top. Without a lower bound on the
weight's scale, the bias of a channel with tiny weights does not fit, and the channel is silently lost (seen with ONNX
Runtime 1.32)."""


def _scale_problem(model: ir.Model) -> str:
    for node in model.graph.all_nodes():
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = node.inputs[1].const_value if node.inputs[1] is not None else None
        if scale is None:
            return f"that of {node.name!r} is not a constant"
        numbers = scale.numpy()
        if not (np.isfinite(numbers).all() and (numbers > 0).all()):
            return f"that of {node.name!r} is not"
    return ""


CONSTANT_SCALES = Condition("the scales of all Q/DQ nodes are constant positive numbers", _scale_problem)


class ToCodes(PrecisionPass):
    """Insert the Q/DQ pairs of `placement` into an FP32 graph, and store its weights as `codes`.

    scales: float32 numbers, one for each tensor of `placement.edges`.
    joint: the scales of branches of a Concat that have another one there than for the layers that read them. All branches of a
        Concat and its output have one scale.
    per_tensor: one scale for a whole weight instead of one for each of its output channels.
    bias: what to add to the bias of a node, float32 (output channels,), by node name. A MatMul gets an Add for it.
    smallest: the lower bound of the scales of weights.

    A pair is named `<tensor>/QuantizeLinear` and `<tensor>/DequantizeLinear`, and its outputs `<tensor>_quantized` and
    `<tensor>_dequantized`. A Concat with quantized branches joins their codes and is followed by one DequantizeLinear: the
    numbers are the same, because all branches have one scale. OpenVINO rounds to whole numbers if Q/DQ pairs stand before
    a Concat of floats (seen with 2026.4).

    Raises PrecisionError for scales that are missing or not positive numbers, for a correction of an unknown node, and for
    weights that are not finite.
    """

    needs = (*PREPARED, opset_from(OPSET))
    leaves = (*PREPARED, CONSTANT_SCALES, VALID)

    def __init__(
        self,
        placement: Placement,
        scales: Mapping[str, float],
        codes: Codes,
        *,
        joint: Mapping[str, float] | None = None,
        per_tensor: bool = False,
        bias: Mapping[str, np.ndarray] | None = None,
        smallest: float = 0.0,
    ) -> None:
        joint = joint or {}
        for tensor in placement.edges:
            scale = np.float32(scales.get(tensor, np.nan))
            if not (np.isfinite(scale) and scale > 0):
                raise PrecisionError(f"the scale of {tensor!r} is {scales.get(tensor)}; expected a positive number")
        for tensor, uses in placement.edges.items():
            for output in (placement.joints[node] for node, _ in uses if node in placement.joints):
                if output in placement.edges:
                    assert joint.get(tensor, scales[tensor]) == scales[output], f"{tensor!r} and {output!r} must share a scale"
        self.placement = placement
        self.scales = scales
        self.codes = codes
        self.joint = joint
        self.per_tensor = per_tensor
        self.bias = bias or {}
        self.smallest = smallest

    def call(self, model: ir.Model) -> PassResult:
        rewrite = _Rewrite(model.graph, self.codes)
        for node, correction in self.bias.items():
            rewrite.add_bias(node, np.asarray(correction, dtype=np.float32))
        rewrite.store_weights(self.placement, self.scales, self.per_tensor, self.smallest)
        rewrite.insert_pairs(self.placement, self.scales, self.joint)
        return PassResult(model, bool(self.placement.edges or self.placement.weights or self.bias))


class _Rewrite(GraphEdit):
    """Inserts pairs into a graph and its branches, in place: each with its constants where the tensor is made or the weight is used.

    ONNX Runtime refuses some pairs in a branch whose constants are outside (MatMul, seen with 1.32).
    """

    def __init__(self, graph: ir.Graph, codes: Codes) -> None:
        super().__init__(graph)
        self.codes = codes
        self.zeros: dict[ir.Graph, ir.Value] = {}

    def insert_pairs(self, placement: Placement, scales: Mapping[str, float], joint: Mapping[str, float]) -> None:
        branches: dict[str, str] = {}  # name of a Concat -> one of its branches
        for tensor, uses in placement.edges.items():
            branches |= {node: tensor for node, _ in uses if node in placement.joints}
        codes: dict[str, ir.Value] = {}
        for name, output in placement.joints.items():
            branch = branches[name]
            codes[output] = self._dequantize_output(self.nodes[name], joint.get(branch, scales[branch]))
        for tensor, uses in placement.edges.items():
            moved = [use for use in uses if use[0] not in placement.joints]
            joined = [use for use in uses if use[0] in placement.joints]
            if tensor not in codes and joined:
                apart = tensor in joint
                codes[tensor], result = self._insert_pair(
                    tensor, joint.get(tensor, scales[tensor]), dequantize=bool(moved) and not apart
                )
                if moved and apart:
                    _, result = self._insert_pair(tensor, scales[tensor], dequantize=True)
            elif tensor not in codes:
                _, result = self._insert_pair(tensor, scales[tensor], dequantize=True)
            else:
                moved = []  # they read the output of the joint by its name
            for node, index in moved:
                self.nodes[node].replace_input_with(index, result)
            for node, index in joined:
                self.nodes[node].replace_input_with(index, codes[tensor])

    def _insert_pair(self, tensor: str, scale: float, *, dequantize: bool) -> tuple[ir.Value, ir.Value]:
        """Insert QuantizeLinear, and DequantizeLinear if asked for, after the producer of `tensor`; returns codes and result."""
        value = self.values[tensor]
        producer = value.producer()
        graph = graph_of(producer) if producer is not None else self.graph
        operands = [value, self._scale(graph, tensor, scale), self._zero(graph)]
        quantize = self.node("QuantizeLinear", operands, tensor, self.value(f"{tensor}_quantized", value, self.codes.dtype))
        pair = [quantize]
        if dequantize:
            result = self.value(f"{tensor}_dequantized", value, ir.DataType.FLOAT)
            pair.append(self.node("DequantizeLinear", [quantize.outputs[0], *operands[1:]], tensor, result))
        self.insert_behind(value, pair)
        return quantize.outputs[0], pair[-1].outputs[0]

    def _dequantize_output(self, node: ir.Node, scale: float) -> ir.Value:
        """Make `node` output codes, followed by a DequantizeLinear whose output takes the old name; returns the codes."""
        codes = node.outputs[0]
        tensor = codes.name or ""
        result = self.take_over(codes, f"{tensor}_quantized")
        codes.type = ir.TensorType(self.codes.dtype)
        graph = graph_of(node)
        operands = [codes, self._scale(graph, tensor, scale), self._zero(graph)]
        graph.insert_after(node, self.node("DequantizeLinear", operands, tensor, result))
        return codes

    def store_weights(self, placement: Placement, scales: Mapping[str, float], per_tensor: bool, smallest: float) -> None:
        """Store weights as codes with a DequantizeLinear, one for all nodes of a graph that use one along the same axis."""
        users: dict[tuple[str, int | None, ir.Graph], list[ir.Node]] = {}
        for name, weight in placement.weights.items():
            axis = None if per_tensor else weight.axis
            users.setdefault((weight.initializer, axis, graph_of(self.nodes[name])), []).append(self.nodes[name])
        inputs = {use: tensor for tensor, uses in placement.edges.items() for use in uses}
        for (initializer, axis, graph), nodes in users.items():
            value = self.graph.initializers[initializer]
            assert value.const_value is not None
            integer = self.codes is INT8  # in FP8, a bias is never turned into codes
            floors = [_scale_floor(node, axis, scales[inputs[node.name or "", 0]]) for node in nodes if integer]
            floor = functools.reduce(np.maximum, floors, np.asarray(smallest))  # of one number, or of one a channel
            try:
                codes, scale = self.codes.quantize_weight(value.const_value.numpy(), axis, floor)
            except PrecisionError as error:
                raise PrecisionError(f"{initializer!r} of {nodes[0].name!r}: {error}") from error
            operands = [
                self.initializer(f"{initializer}_{self.codes.name}", codes, graph),
                self.initializer(f"{initializer}_scale", scale, graph),
                # Of its own: ONNX Runtime makes unsigned weights, for `session.x64quantprecision`, of each with its zero point.
                self.initializer(f"{initializer}_zero_point", np.zeros(scale.shape, self.codes.dtype.numpy()), graph),
            ]
            attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
            result = self.value(f"{initializer}_dequantized", value, ir.DataType.FLOAT)
            graph.insert_before(nodes[0], self.node("DequantizeLinear", operands, initializer, result, attributes))
            for node in nodes:
                node.replace_input_with(1, result)
            self.drop(value)

    def _scale(self, graph: ir.Graph, tensor: str, scale: float) -> ir.Value:
        return self.initializer(f"{tensor}_scale", np.array(scale, dtype=np.float32), graph)

    def _zero(self, graph: ir.Graph) -> ir.Value:
        if graph not in self.zeros:
            self.zeros[graph] = self.initializer(f"{self.codes.name}_zero_point", np.zeros((), self.codes.dtype.numpy()), graph)
        return self.zeros[graph]


def _scale_floor(node: ir.Node, axis: int | None, scale: float) -> np.ndarray:
    """The smallest scale of the weight of `node` at which its bias fits into 32 bits; `scale` is the scale of its input."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or bias.const_value is None:
        return np.zeros(())
    floor = np.abs(bias.const_value.numpy().astype(np.float64)) / (np.float64(np.float32(scale)) * _BIAS_CODES)
    if axis is None or not floor.ndim or floor.shape[-1] == 1:
        return np.asarray(floor.max(initial=0.0))
    return np.asarray(floor.reshape(-1, floor.shape[-1]).max(axis=0))  # a Gemm may have a bias for each row
