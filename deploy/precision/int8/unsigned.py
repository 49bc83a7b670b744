"""The pass that makes the INT8 activations of a quantized graph unsigned and its biases INT32, as ONNX Runtime's kernels take them."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from deploy.precision.codes import INT8
from deploy.precision.int8.edit import GraphEdit, graph_of
from deploy.precision.int8.rewrite import CONSTANT_SCALES
from deploy.precision.passes import PREPARED, VALID, PrecisionPass

MIDDLE = 128
"""What turns a signed code into an unsigned one, and the zero point of the result."""

_CODES = 255
_BIASED = ("Conv", "Gemm")
_BIAS = 2


class ToUnsigned(PrecisionPass):
    """Give every activation of a graph that `ToCodes` made unsigned codes, and Conv and Gemm INT32 biases.

    lows: the smallest number of a tensor, by its name. What lies between that and the largest number that its INT8 scale holds
        gets all 256 codes: behind a ReLU, the zero point is 0 and the steps are half as large. A tensor that is not in `lows`, and
        one whose numbers lie as far below zero as above, keeps its scale, and its codes are those of before and 128: the same
        numbers.

    chosen: after the call, scale and zero point by the name of the codes.

    Biases fit into 32 bits because `ToCodes` gives the scales of weights a lower bound.
    """

    needs = (*PREPARED, CONSTANT_SCALES)
    leaves = (*PREPARED, CONSTANT_SCALES, VALID)

    def __init__(self, lows: Mapping[str, float]) -> None:
        self.lows = lows
        self.chosen: dict[str, tuple[float, int]] = {}

    def call(self, model: ir.Model) -> PassResult:
        rewrite = _Rewrite(model.graph)
        nodes = list(model.graph.all_nodes())
        pairs = [node for node in nodes if node.op_type == "QuantizeLinear"]
        chosen = {node.outputs[0]: self._finest(node) for node in pairs}
        joins = [node for node in nodes if node.op_type == "Concat" and node.outputs[0].dtype == ir.DataType.INT8]
        while mixed := [join for join in joins if len({chosen[codes] for codes in _joined(join.outputs[0])}) > 1]:
            for codes in _joined(mixed[0].outputs[0]):  # what is joined has one scale
                pair = codes.producer()
                assert pair is not None
                chosen[codes] = float(_constant(pair, 1)), MIDDLE
        chosen |= {join.outputs[0]: chosen[_joined(join.outputs[0])[0]] for join in joins}
        for codes, (scale, zero) in chosen.items():
            rewrite.set_parameters(codes, scale, zero)
        self.chosen = {_name(codes): each for codes, each in chosen.items()}
        for node in nodes:
            rewrite.store_bias(node)
        rewrite.clean()
        return PassResult(model, bool(pairs))

    def _finest(self, pair: ir.Node) -> tuple[float, int]:
        return finest(float(_constant(pair, 1)), self.lows.get(_name(pair.inputs[0])))


def finest(scale: float, low: float | None) -> tuple[float, int]:
    """Scale and zero point of unsigned codes for the numbers from `low` to what a symmetric INT8 `scale` holds."""
    high = float(np.float32(scale) * np.float32(INT8.largest))
    least = -high if low is None else min(max(low, -high), 0.0)
    finer = float(np.float32((high - least) / _CODES))
    zero = round(-least / finer)
    return (finer, zero) if zero < MIDDLE - 1 else (scale, MIDDLE)


def parameters_of(value: ir.Value | None) -> tuple[str, float, int]:
    """The name, the scale and the zero point of the codes that `value` is, or is made of; "", 0, 0 where it is neither."""
    maker = value.producer() if value is not None else None
    if maker is None or maker.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return "", 0.0, 0
    codes = maker.outputs[0] if maker.op_type == "QuantizeLinear" else maker.inputs[0]
    return _name(codes), float(_constant(maker, 1)), int(_constant(maker, 2))


def restore_biases(model: ir.Model) -> None:
    """Turn INT32 biases into constants in floating point again, in place."""
    for node in list(model.graph.all_nodes()):
        codes = node.inputs[0].const_value if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
        if codes is not None and codes.dtype == ir.DataType.INT32:
            name = f"{node.outputs[0].name}_restored"
            bias = (codes.numpy() * _constant(node, 1).astype(np.float64)).astype(np.float32)
            value = _registered(graph_of(node), name, bias)
            for reader, index in list(node.outputs[0].uses()):
                reader.replace_input_with(index, value)


class _Rewrite(GraphEdit):
    """Changes pairs and biases in place, each with its constants in its own graph: see `deploy.precision.int8.rewrite`."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__(graph)
        self._zeros: dict[tuple[ir.Graph, int], ir.Value] = {}

    def set_parameters(self, codes: ir.Value, scale: float, zero: int) -> None:
        steps: dict[ir.Graph, ir.Value] = {}
        codes.type = ir.TensorType(ir.DataType.UINT8)
        for node in (codes.producer(), *(reader for reader, _ in codes.uses())):
            if node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                graph = graph_of(node)
                if graph not in steps:
                    steps[graph] = self.initializer(f"{codes.name}_scale", np.array(scale, dtype=np.float32), graph)
                node.replace_input_with(1, steps[graph])
                node.replace_input_with(2, self._zero(graph, zero))

    def _zero(self, graph: ir.Graph, zero: int) -> ir.Value:
        if (graph, zero) not in self._zeros:
            self._zeros[graph, zero] = self.initializer(f"uint8_zero_point_{zero}", np.array(zero, dtype=np.uint8), graph)
        return self._zeros[graph, zero]

    def store_bias(self, node: ir.Node) -> None:
        """Store the bias of a quantized layer in steps of the product of the scales of its input and its weight."""
        bias = _bias(node)
        pairs = [value.producer() if value is not None else None for value in node.inputs[:2]]
        if bias is None or any(each is None or each.op_type != "DequantizeLinear" for each in pairs):
            return
        of_input, of_weight = (_constant(each, 1) for each in pairs if each is not None)
        scale = np.asarray(of_input * of_weight, dtype=np.float32)
        steps = np.rint(bias.astype(np.float64) / scale)
        assert np.abs(steps).max(initial=0.0) <= np.iinfo(np.int32).max, "the scales of weights have a lower bound"
        graph, old = graph_of(node), node.inputs[_BIAS]
        name = _name(old)
        codes = self.initializer(f"{name}_int32", steps.astype(np.int32), graph)
        operands = [codes, self.initializer(f"{name}_scale", scale, graph)]
        attributes = [ir.AttrInt64("axis", 0)] if scale.ndim else []
        result = self.value(f"{name}_dequantized", codes, ir.DataType.FLOAT)
        graph.insert_before(node, self.node("DequantizeLinear", operands, name, result, attributes))
        node.replace_input_with(_BIAS, result)

    def clean(self) -> None:
        for graph in (self.graph, *self.graph.subgraphs()):
            for value in list(graph.initializers.values()):
                self.drop(value)


def _registered(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _bias(node: ir.Node) -> np.ndarray | None:
    """The constant bias of a Conv or Gemm, one number a channel; None for one that is computed, or differs by row."""
    value = node.inputs[_BIAS] if node.op_type in _BIASED and len(node.inputs) > _BIAS else None
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    bias = value.const_value.numpy()
    return bias.reshape(-1) if bias.ndim and bias.size == bias.shape[-1] else None


def _joined(codes: ir.Value) -> list[ir.Value]:
    """The codes that a Concat joins, and those that its branches join."""
    node = codes.producer()
    if node is None or node.op_type != "Concat":
        return [codes]
    return [each for value in node.inputs if value is not None for each in _joined(value)]


def _constant(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""
