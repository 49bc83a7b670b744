"""The pass that makes an FP32 graph INT8: Q/DQ pairs around its layers, and INT8 weights.

Quantization is symmetric: the zero point is 0, and the codes of weights are -127 to 127.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from deploy.errors import PrecisionError
from deploy.precision.graph import unused
from deploy.precision.int8.options import OPSET
from deploy.precision.int8.placement import Placement
from deploy.precision.passes import PREPARED, VALID, Condition, PrecisionPass, opset_from

LARGEST = 127
"""The largest code. -128 is not used for weights, so that the codes are symmetric, as TensorRT expects."""

_BIAS = 2
_MATRIX = 2

_DEAD = 2.0**-14
"""The scale of a channel of zeros. Any scale would do; this one is a normal number in FP16 too."""

_BIAS_CODES = 2.0**29
"""ONNX Runtime stores a bias in 32 bits, at the product of the scales of input and weight; unsigned activations may have steps of half
the size, and the sum of products comes on top. Without a lower bound on the
weight's scale, the bias of a channel with tiny weights does not fit, and the channel is silently lost (seen with ONNX
Runtime 1.32)."""


def quantize_weight(weight: np.ndarray, axis: int | None, floor: float | np.ndarray = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Quantize `weight` (floating point, any shape): int8 codes of the same shape, and float32 scales.

    The scales have shape (C,), where C is the size of `axis`, or () without an axis. A scale is the largest magnitude
    divided by 127, and at least `floor` (one number, or one for each index of `axis`). Codes are rounded half to even. Raises PrecisionError for
    weights that are not finite.
    """
    array = np.asarray(weight, dtype=np.float32)
    others = None if axis is None else tuple(other for other in range(array.ndim) if other != axis % array.ndim)
    amax = np.maximum(array.max(axis=others, initial=0.0), -array.min(axis=others, initial=0.0))
    if not np.isfinite(amax).all():
        raise PrecisionError("a weight has NaN or infinity: it cannot be quantized")
    scale = np.maximum(np.where(amax > 0, amax / np.float32(LARGEST), _DEAD), np.maximum(floor, np.finfo(np.float32).tiny))
    scale = scale.astype(np.float32)
    broad = scale if others is None else np.expand_dims(scale, others)
    codes = array / broad
    np.rint(codes, out=codes)
    return np.clip(codes, -LARGEST, LARGEST, out=codes).astype(np.int8), scale


def read_back(exact: np.ndarray, scale: float, shift: float = 0.0) -> np.ndarray:
    """An activation (float32, any shape) after quantization to INT8 and back; `shift` is taken off before and added again."""
    step = np.float32(scale)
    codes: np.ndarray = np.divide(exact - np.float32(shift) if shift else exact, step)
    np.rint(codes, out=codes)
    np.clip(codes, -LARGEST - 1, LARGEST, out=codes)
    codes *= step
    if shift:
        codes += np.float32(shift)
    return codes


def bias_place(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The node and the input that hold the constant bias of a layer; behind a MatMul, an Add of a vector."""
    if node.op_type != "MatMul":
        bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
        return (node, _BIAS) if bias is not None and bias.const_value is not None else None
    uses = node.outputs[0].uses()
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    add, index = next(iter(uses))
    bias = add.inputs[1 - index] if add.op_type == "Add" else None
    if bias is None or bias.const_value is None or not bias.is_initializer():
        return None
    shape = bias.const_value.shape.numpy()
    return (add, 1 - index) if len(shape) > 0 and int(np.prod(shape[:-1])) == 1 else None


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


class ToInt8(PrecisionPass):
    """Insert the Q/DQ pairs of `placement` into an FP32 graph, and store its weights as INT8.

    scales: float32 numbers, one for each tensor of `placement.edges`.
    joint: the scales of branches of a Concat that have another one there than for the layers that read them. All branches of a
        Concat and its output have one scale.
    per_tensor: one scale for a whole weight instead of one for each of its output channels.
    bias: what to add to the bias of a node, float32 (output channels,), by node name. A MatMul gets an Add for it.
    smallest: the lower bound of the scales of weights.
    shifts: what to take off tensors that only layers with a matrix read, before they are quantized, because their numbers lie on
        one side of zero. Those layers get the product of their INT8 weight with it as a bias, so that zero points stay 0.

    added: after the call, what was added to the bias of a node in all, by its name.

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
        *,
        joint: Mapping[str, float] | None = None,
        per_tensor: bool = False,
        bias: Mapping[str, np.ndarray] | None = None,
        smallest: float = 0.0,
        shifts: Mapping[str, float] | None = None,
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
        self.joint = joint
        self.per_tensor = per_tensor
        self.bias = bias or {}
        self.smallest = smallest
        self.shifts = shifts or {}
        self.added: dict[str, np.ndarray] = {}

    def call(self, model: ir.Model) -> PassResult:
        rewrite = _Rewrite(model.graph)
        self.added = {node: np.asarray(correction, dtype=np.float32) for node, correction in self.bias.items()}
        for node, correction in self.added.items():
            rewrite.add_bias(node, correction)
        matrices = rewrite.store_weights(self.placement, self.scales, self.per_tensor, self.smallest)
        for tensor, shift in self.shifts.items():
            for node, _ in self.placement.edges[tensor]:
                product = (matrices[node] * np.float32(shift)).astype(np.float32)
                rewrite.add_bias(node, product)
                self.added[node] = self.added.get(node, np.float32(0)) + product
        rewrite.insert_pairs(self.placement, self.scales, self.joint, self.shifts)
        return PassResult(model, bool(self.placement.edges or self.placement.weights or self.bias))


class _Rewrite:
    """Inserts pairs into a graph and its branches, in place: each with its constants where the tensor is made or the weight is used.

    ONNX Runtime refuses some pairs in a branch whose constants are outside (MatMul, seen with 1.32).
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.first = graph[0]
        self.nodes = {node.name or "": node for node in graph.all_nodes()}
        made = (value for node in graph.all_nodes() for value in node.outputs)
        self.values = {value.name: value for value in (*graph.inputs, *made)}
        self.taken = set(self.nodes) | set(self.values) | set(graph.initializers)
        self.zeros: dict[tuple[ir.Graph, tuple[int, ...]], ir.Value] = {}

    def insert_pairs(
        self, placement: Placement, scales: Mapping[str, float], joint: Mapping[str, float], shifts: Mapping[str, float]
    ) -> None:
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
                _, result = self._insert_pair(tensor, scales[tensor], dequantize=True, shift=shifts.get(tensor, 0.0))
            else:
                moved = []  # they read the output of the joint by its name
            for node, index in moved:
                self.nodes[node].replace_input_with(index, result)
            for node, index in joined:
                self.nodes[node].replace_input_with(index, codes[tensor])

    def _insert_pair(self, tensor: str, scale: float, *, dequantize: bool, shift: float = 0.0) -> tuple[ir.Value, ir.Value]:
        """Insert QuantizeLinear, and DequantizeLinear if asked for, after the producer of `tensor`; returns codes and result."""
        value = self.values[tensor]
        producer = value.producer()
        graph = _graph_of(producer) if producer is not None else self.graph
        pair = []
        source = value
        if shift:
            constant = self._initializer(graph, f"{tensor}_shift", np.array(shift, dtype=np.float32))
            shifted = self._value(f"{tensor}_shifted", value, ir.DataType.FLOAT)
            pair.append(self._node("Sub", [value, constant], tensor, shifted))
            source = shifted
        operands = [source, self._scale(graph, tensor, scale), self._zero(graph, ())]
        quantize = self._node("QuantizeLinear", operands, tensor, self._value(f"{tensor}_quantized", value, ir.DataType.INT8))
        pair.append(quantize)
        if dequantize:
            result = self._value(f"{tensor}_dequantized", value, ir.DataType.FLOAT)
            pair.append(self._node("DequantizeLinear", [quantize.outputs[0], *operands[1:]], tensor, result))
        if producer is None:
            graph.insert_before(self.first, pair)
        else:
            graph.insert_after(producer, pair)
        return quantize.outputs[0], pair[-1].outputs[0]

    def _dequantize_output(self, node: ir.Node, scale: float) -> ir.Value:
        """Make `node` output codes, followed by a DequantizeLinear whose output takes the old name; returns the codes."""
        codes = node.outputs[0]
        tensor = codes.name or ""
        result = self._take_over(codes, f"{tensor}_quantized")
        codes.type = ir.TensorType(ir.DataType.INT8)
        graph = _graph_of(node)
        operands = [codes, self._scale(graph, tensor, scale), self._zero(graph, ())]
        graph.insert_after(node, self._node("DequantizeLinear", operands, tensor, result))
        return codes

    def store_weights(
        self, placement: Placement, scales: Mapping[str, float], per_tensor: bool, smallest: float
    ) -> dict[str, np.ndarray]:
        """Store weights as INT8 initializers with a DequantizeLinear, one for all nodes of a graph that use one along the same axis.

        Returns, for every layer with a matrix, what its INT8 weight makes of ones.
        """
        sums: dict[str, np.ndarray] = {}
        users: dict[tuple[str, int | None, ir.Graph], list[ir.Node]] = {}
        for name, weight in placement.weights.items():
            axis = None if per_tensor else weight.axis
            users.setdefault((weight.initializer, axis, _graph_of(self.nodes[name])), []).append(self.nodes[name])
        inputs = {use: tensor for tensor, uses in placement.edges.items() for use in uses}
        for (initializer, axis, graph), nodes in users.items():
            value = self.graph.initializers[initializer]
            assert value.const_value is not None
            floors = [_scale_floor(node, axis, scales[inputs[node.name or "", 0]]) for node in nodes]
            floor = functools.reduce(np.maximum, floors, np.asarray(smallest))  # of one number, or of one a channel
            try:
                codes, scale = quantize_weight(value.const_value.numpy(), axis, floor)
            except PrecisionError as error:
                raise PrecisionError(f"{initializer!r} of {nodes[0].name!r}: {error}") from error
            operands = [
                self._initializer(graph, f"{initializer}_int8", codes),
                self._initializer(graph, f"{initializer}_scale", scale),
                self._zero(graph, scale.shape),
            ]
            attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
            result = self._value(f"{initializer}_dequantized", value, ir.DataType.FLOAT)
            graph.insert_before(nodes[0], self._node("DequantizeLinear", operands, initializer, result, attributes))
            for node in nodes:
                node.replace_input_with(1, result)
                if codes.ndim == _MATRIX:
                    along = node.attributes.get_int("transB", 0) if node.op_type == "Gemm" else 0
                    steps = scale if axis is None else np.expand_dims(scale, 1 - axis)
                    sums[node.name or ""] = (codes * steps.astype(np.float64)).sum(axis=along)
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[initializer]
        return sums

    def add_bias(self, name: str, correction: np.ndarray) -> None:
        if name not in self.nodes:
            raise PrecisionError(f"no node is named {name!r}: there is no bias to correct")
        node = self.nodes[name]
        holder, index = bias_place(node) or (node, _BIAS)
        old = holder.inputs[index] if len(holder.inputs) > index else None
        if old is None and node.op_type == "MatMul":
            self._add_after(node, correction)
            return
        if old is None:
            node.resize_inputs(_BIAS + 1)
        elif old.const_value is None:
            self._add_to_bias(node, old, correction)
            return
        else:
            correction = old.const_value.numpy() + correction
        holder.replace_input_with(index, self._initializer(_graph_of(holder), f"{name}/corrected_bias", correction))
        if old is not None and not old.uses() and not old.is_graph_output():
            owner = old.graph
            assert isinstance(owner, ir.Graph)
            del owner.initializers[old.name or ""]

    def _add_to_bias(self, node: ir.Node, bias: ir.Value, correction: np.ndarray) -> None:
        """Add `correction` to the computed `bias` of `node`."""
        operands = [bias, self._initializer(_graph_of(node), f"{node.name}/correction", correction)]
        result = self._value(f"{node.name}/corrected_bias", bias, ir.DataType.FLOAT)
        label = self._claim(f"{node.name}/bias_correction")
        _graph_of(node).insert_before(node, ir.Node("", "Add", operands, outputs=[result], name=label))
        node.replace_input_with(2, result)

    def _add_after(self, node: ir.Node, correction: np.ndarray) -> None:
        """Add `correction` to the output of `node`; the sum takes over the name of the output."""
        before = node.outputs[0]
        after = self._take_over(before, f"{before.name}_uncorrected")
        operands = [before, self._initializer(_graph_of(node), f"{node.name}/correction", correction)]
        label = self._claim(f"{node.name}/bias_correction")
        _graph_of(node).insert_after(node, ir.Node("", "Add", operands, outputs=[after], name=label))

    def _take_over(self, value: ir.Value, new_name: str) -> ir.Value:
        """A new float value that takes over the name and the uses of `value`, which is renamed to `new_name`."""
        uses, name = list(value.uses()), value.name
        value.name = self._claim(new_name)
        taker = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        for user, index in uses:
            user.replace_input_with(index, taker)
        maker = value.producer()
        assert maker is not None
        outputs = _graph_of(maker).outputs
        for index, output in enumerate(outputs):
            if output is value:
                outputs[index] = taker
        self.values[name] = taker
        return taker

    def _scale(self, graph: ir.Graph, tensor: str, scale: float) -> ir.Value:
        return self._initializer(graph, f"{tensor}_scale", np.array(scale, dtype=np.float32))

    def _zero(self, graph: ir.Graph, shape: tuple[int, ...]) -> ir.Value:
        if (graph, shape) not in self.zeros:
            name = "_".join(["int8_zero_point", *map(str, shape)])
            self.zeros[graph, shape] = self._initializer(graph, name, np.zeros(shape, dtype=np.int8))
        return self.zeros[graph, shape]

    def _initializer(self, graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
        name = self._claim(name)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    def _value(self, name: str, like: ir.Value, dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=self._claim(name), shape=like.shape, type=ir.TensorType(dtype))

    def _node(
        self, operator: str, inputs: list[ir.Value], tensor: str, output: ir.Value, attributes: Sequence[ir.Attr] = ()
    ) -> ir.Node:
        """A node named `<tensor>/<operator>` with the output `output`."""
        return ir.Node("", operator, inputs, attributes, outputs=[output], name=self._claim(f"{tensor}/{operator}"))

    def _claim(self, name: str) -> str:
        name = unused(name, self.taken)
        self.taken.add(name)
        return name


def _graph_of(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _scale_floor(node: ir.Node, axis: int | None, scale: float) -> np.ndarray:
    """The smallest scale of the weight of `node` at which its bias fits into 32 bits; `scale` is the scale of its input."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or bias.const_value is None:
        return np.zeros(())
    floor = np.abs(bias.const_value.numpy().astype(np.float64)) / (np.float64(np.float32(scale)) * _BIAS_CODES)
    if axis is None or not floor.ndim or floor.shape[-1] == 1:
        return np.asarray(floor.max(initial=0.0))
    return np.asarray(floor.reshape(-1, floor.shape[-1]).max(axis=0))  # a Gemm may have a bias for each row
