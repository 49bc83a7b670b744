"""Edits of a graph that the INT8 passes share."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from deploy.errors import PrecisionError
from deploy.precision.graph import unused

_BIAS = 2


def bias_place(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The node and the input that hold the constant bias of a layer, or the constant part of a computed one.

    Behind a MatMul, that is an Add of a vector; a computed bias has one before the layer.
    """
    if node.op_type == "MatMul":
        return _added_vector(node.outputs[0], behind=True)
    bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
    if bias is None or bias.const_value is not None:
        return (node, _BIAS) if bias is not None else None
    return _added_vector(bias, behind=False)


def _added_vector(value: ir.Value, *, behind: bool) -> tuple[ir.Node, int] | None:
    """The Add that makes `value`, or that alone reads it, and the input where it takes a constant vector."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    add = next(iter(uses))[0] if behind else value.producer()
    if add is None or add.op_type != "Add":
        return None
    for index, operand in enumerate(add.inputs):
        if operand is not None and operand.is_initializer() and operand.const_value is not None:
            shape = operand.const_value.shape.numpy()
            return (add, index) if len(shape) > 0 and int(np.prod(shape[:-1])) == 1 else None
    return None


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that `node` is in: the main one, or a branch."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


class GraphEdit:
    """A graph and its branches, of one scope (`deploy.precision.int8.branches`), edited in place. Every new name is a free one.

    nodes, values: by name, as they were at the start; a value that takes over a name is entered.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes = {node.name or "": node for node in graph.all_nodes()}
        made = (value for node in graph.all_nodes() for value in node.outputs)
        self.values = {value.name: value for value in (*graph.inputs, *made)}
        self._first = graph[0]
        constants = (name for each in (graph, *graph.subgraphs()) for name in each.initializers)
        self._taken = {*self.nodes, *self.values, *constants}

    def initializer(self, name: str, array: np.ndarray, graph: ir.Graph | None = None) -> ir.Value:
        """A constant of `graph`, or of the main graph, where all branches can read it."""
        name = self._claim(name)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        (graph or self.graph).register_initializer(value)
        return value

    def value(self, name: str, like: ir.Value, dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=self._claim(name), shape=like.shape, type=ir.TensorType(dtype))

    def node(
        self, operator: str, inputs: list[ir.Value], tensor: str, output: ir.Value, attributes: Sequence[ir.Attr] = ()
    ) -> ir.Node:
        """A node named `<tensor>/<operator>` with the output `output`."""
        return ir.Node("", operator, inputs, attributes, outputs=[output], name=self._claim(f"{tensor}/{operator}"))

    def drop(self, initializer: ir.Value) -> None:
        """Remove an initializer that nothing reads."""
        if not initializer.uses() and not initializer.is_graph_output():
            owner = initializer.graph
            assert isinstance(owner, ir.Graph)
            del owner.initializers[initializer.name or ""]

    def insert_behind(self, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
        """Insert nodes behind the one that makes `value`, or before all others."""
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self._first, nodes)
        else:
            graph_of(producer).insert_after(producer, nodes)

    def add_bias(self, name: str, correction: np.ndarray) -> None:
        """Add to the bias of a layer, which may be computed, or to its output. Raises PrecisionError for an unknown node.

        correction: float32 (output channels,).
        """
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
        holder.replace_input_with(index, self.initializer(f"{name}/corrected_bias", correction, graph_of(holder)))
        if old is not None:
            self.drop(old)

    def _add_to_bias(self, node: ir.Node, bias: ir.Value, correction: np.ndarray) -> None:
        """Add `correction` to the computed `bias` of `node`."""
        operands = [bias, self.initializer(f"{node.name}/correction", correction, graph_of(node))]
        result = self.value(f"{node.name}/corrected_bias", bias, ir.DataType.FLOAT)
        label = self._claim(f"{node.name}/bias_correction")
        graph_of(node).insert_before(node, ir.Node("", "Add", operands, outputs=[result], name=label))
        node.replace_input_with(2, result)

    def _add_after(self, node: ir.Node, correction: np.ndarray) -> None:
        """Add `correction` to the output of `node`; the sum takes over the name of the output."""
        before = node.outputs[0]
        after = self.take_over(before, f"{before.name}_uncorrected")
        operands = [before, self.initializer(f"{node.name}/correction", correction, graph_of(node))]
        label = self._claim(f"{node.name}/bias_correction")
        graph_of(node).insert_after(node, ir.Node("", "Add", operands, outputs=[after], name=label))

    def take_over(self, value: ir.Value, new_name: str) -> ir.Value:
        """A new float value that takes over the name and the uses of `value`, which is renamed to `new_name`."""
        uses, name = list(value.uses()), value.name
        value.name = self._claim(new_name)
        taker = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        for user, index in uses:
            user.replace_input_with(index, taker)
        maker = value.producer()
        assert maker is not None
        outputs = graph_of(maker).outputs
        for index, output in enumerate(outputs):
            if output is value:
                outputs[index] = taker
        self.values[name] = taker
        return taker

    def _claim(self, name: str) -> str:
        name = unused(name, self._taken)
        self._taken.add(name)
        return name
