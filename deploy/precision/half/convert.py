"""ONNX -> ONNX: everything that can compute in FP16 or BF16 does, with a Cast where it meets what stays in FP32.

A node runs in half precision when the definition of its operator lets its float inputs be of that type. The graph stays
strongly typed: no operator gets floats of two types but where its definition fixes one (the scales of Resize).
"""

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from deploy.artifact.manifest import Exclusion
from deploy.errors import PrecisionError
from deploy.precision.graph import STANDARD, check, prepare, unused
from deploy.precision.half.options import OPSET, HalfPrecision
from deploy.precision.half.plan import ANY_TYPE, FLOAT, HALF, Ports, is_float, plan_half, round_to


def to_half(
    model: onnx.ModelProto, precision: HalfPrecision, *, half_io: bool = False, keep: Mapping[str, str] | None = None
) -> tuple[onnx.ModelProto, list[Exclusion]]:
    """Convert an FP32 graph: weights, and all nodes but those of `keep` (name -> reason) and those that cannot.

    Graph inputs and outputs stay FP32 (a Cast stands behind them) unless `half_io`. Subgraphs of If, Loop and Scan stay
    FP32 whole. Names of nodes are kept; unnamed ones get names as `prepare` gives them, which are those that `keep` uses.
    A Cast of a value `x` is named `x_to_fp16` or `x_to_fp32`, and there is one of a value and direction. A tensor that
    both sorts of nodes use is there twice.

    Returns the graph, which passes onnx.checker in full, and the nodes left in FP32. Raises PrecisionError for a graph
    that is not valid or names in `keep` that it does not have.
    """
    graph = ir.from_proto(prepare(model, opset=OPSET[precision]))
    plan = plan_half(graph, precision)
    keep = keep or {}
    unknown = set(keep) - {node.name for node in graph.graph}
    if unknown:
        raise PrecisionError(f"no node is named {', '.join(map(repr, sorted(unknown)))}: nothing to keep in FP32")
    stay = {**plan.stay, **keep}
    ports = {node: found for node, found in plan.half.items() if node.name not in keep}
    _Conversion(graph.graph, precision, ports).run(half_io=half_io)
    check(graph, f"the {precision.upper()} graph is not valid")
    exclusions = [Exclusion(node=node.name, reason=stay[node.name]) for node in graph.graph if node.name and node.name in stay]
    return ir.to_proto(graph), exclusions


class _Conversion:
    """Changes the types in one graph, in place."""

    def __init__(self, graph: ir.Graph, precision: HalfPrecision, ports: Mapping[ir.Node, Ports]) -> None:
        self.graph = graph
        self.precision = precision
        self.half = HALF[precision]
        self.ports = ports
        self.twins: dict[ir.Value, ir.Value] = {}  # the same value in the other type
        self.names = {node.name for node in graph.all_nodes()} | {value.name for value in _all_values(graph)}

    def run(self, *, half_io: bool) -> None:
        floats = [value for value in _all_values(self.graph) if is_float(value)]
        if half_io:
            for value in self.graph.inputs:
                if is_float(value):
                    value.dtype = self.half
        for node, ports in self.ports.items():
            for index in ports.outputs:
                node.outputs[index].dtype = self.half
        uses = {value: list(value.uses()) for value in floats}  # before there are Casts
        for index, value in enumerate(self.graph.outputs):
            if value in uses and (value.dtype == self.half) != half_io:
                self.graph.outputs[index] = self._output_twin(value)
        for value in floats:
            self._convert_uses(value, uses[value])

    def _convert_uses(self, value: ir.Value, uses: Sequence[tuple[ir.Node, int]]) -> None:
        others = [(node, index) for node, index in uses if self._wanted(node, index, value) != value.dtype]
        if not others:
            return
        if value.is_initializer() and len(others) == len(value.uses()) and not value.is_graph_output():
            # Nobody needs it in FP32.
            value.const_value = self._rounded(value)
            value.dtype = self.half
            return
        if value not in self.twins:
            if value.is_initializer():
                self.twins[value] = self._initializer_twin(value)
            else:
                self.twins[value] = self._cast(value, self._new_name(value))
        for node, index in others:
            node.replace_input_with(index, self.twins[value])

    def _wanted(self, node: ir.Node, index: int, value: ir.Value) -> ir.DataType | None:
        """The type in which `node` wants the float `value`."""
        if node.op_type in ANY_TYPE and node.domain in STANDARD:
            return value.dtype
        ports = self.ports.get(node)
        return self.half if ports is not None and index in ports.inputs else FLOAT

    def _output_twin(self, value: ir.Value) -> ir.Value:
        """A Cast of `value` that takes over its name, for names of graph outputs stay; `value` gets another."""
        if value not in self.twins:
            name = value.name or ""
            value.name = self._claim(f"{name}_{'fp32' if value.dtype == FLOAT else self.precision}")
            self.twins[value] = self._cast(value, name)
        return self.twins[value]

    def _cast(self, value: ir.Value, name: str) -> ir.Value:
        """`value` in the other type, as `name`, from a Cast right behind where it is made."""
        target = self.half if value.dtype == FLOAT else FLOAT
        label = f"{value.name}_to_{self.precision if target == self.half else 'fp32'}"
        result = ir.Value(name=name, shape=value.shape, type=ir.TensorType(target))
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", target)], outputs=[result], name=self._claim(label))
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, cast)
        elif len(self.graph):
            self.graph.insert_before(self.graph[0], cast)
        else:
            self.graph.append(cast)
        return result

    def _initializer_twin(self, value: ir.Value) -> ir.Value:
        tensor = self._rounded(value)
        twin = ir.Value(name=self._new_name(value), shape=value.shape, type=ir.TensorType(self.half), const_value=tensor)
        self.graph.register_initializer(twin)
        return twin

    def _rounded(self, value: ir.Value) -> ir.TensorProtocol:
        assert value.const_value is not None
        return ir.tensor(round_to(value.const_value.numpy(), self.precision), dtype=self.half, name=value.name)

    def _new_name(self, value: ir.Value) -> str:
        return self._claim(f"{value.name}_{self.precision if value.dtype == FLOAT else 'fp32'}")

    def _claim(self, name: str) -> str:
        name = unused(name, self.names)
        self.names.add(name)
        return name


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    """Inputs, initializers and node outputs of the graph itself, without its subgraphs."""
    return [
        *graph.inputs,
        *graph.initializers.values(),
        *(value for node in graph for value in node.outputs if value.name),
    ]
