"""The pass that converts an FP32 graph to FP16 or BF16, with a Cast wherever it meets nodes that stay in FP32.

A node is converted if the definition of its operator allows half precision for its float inputs. The graph stays strongly
typed: an operator has float inputs of two types only if its definition fixes one of them (the scales of Resize).
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from deploy.artifact.manifest import Exclusion
from deploy.errors import PrecisionError
from deploy.precision.constants import FoldConstants
from deploy.precision.graph import STANDARD, unused
from deploy.precision.half.keep import nodes_to_keep
from deploy.precision.half.options import OPSET, HalfPrecision
from deploy.precision.half.plan import ANY_TYPE, FLOAT, HALF, Ports, is_float, plan_half, round_to
from deploy.precision.passes import PREPARED, VALID, PrecisionPass, opset_from
from deploy.precision.prepare import Prepare
from deploy.precision.ranges import Range, activation_ranges
from deploy.progress import Progress, silent


def convert_model(
    model: ir.Model,
    precision: HalfPrecision,
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    half_io: bool = False,
    shown: str,
    progress: Progress = silent,
) -> list[Exclusion]:
    """Convert an FP32 model to half precision in place; returns the nodes left in FP32, with the reason.

    Nodes stay FP32 if half precision cannot represent their weights or their activations on `feeds`, or if their operator
    is not defined for it. `shown`: what to call the model in an error. Raises PrecisionError for a graph that is not valid
    or cannot run, and if an output is not finite in FP32.
    """
    try:
        Prepare(opset=OPSET[precision])(model)
        FoldConstants()(model)
        ranges = activation_ranges(model, feeds)
    except PrecisionError as error:
        raise PrecisionError(f"cannot convert {shown}: {error}") from error
    _check_finite(model, ranges, shown)
    progress(f"converting to {precision.upper()}")
    to_half = ToHalf(precision, half_io=half_io, keep=nodes_to_keep(model, ranges, precision))
    to_half(model)
    return to_half.exclusions


def _check_finite(model: ir.Model, ranges: Mapping[str, Range], shown: str) -> None:
    """Raise PrecisionError if an output is not finite in FP32, because then nothing can be compared."""
    broken = {name for name, seen in ranges.items() if not seen.finite}
    output = next((value.name for value in model.graph.outputs if value.name in broken), None)
    if output is not None:
        node = next(node for node in model.graph for value in node.outputs if value.name in broken)
        raise PrecisionError(
            f"{shown} gives NaN or infinity in output {output!r} in FP32 already, first in node {node.name!r}"
            f" ({node.op_type}); check the weights and that the input is what the model takes"
        )


class ToHalf(PrecisionPass):
    """Convert an FP32 graph: weights and all nodes except those of `keep` (name -> reason) and those that cannot be converted.

    Graph inputs and outputs stay FP32, with a Cast next to them, unless `half_io`. Subgraphs of If, Loop and Scan stay FP32
    as a whole. Nodes keep their names. A Cast of a value `x` is named `x_to_fp16` or `x_to_fp32`, and there is at most one
    for a value and direction. A weight that nodes of both precisions use is stored twice.

    exclusions: after the call, the nodes left in FP32, with the reason.

    Raises PrecisionError for names in `keep` that the graph does not have.
    """

    leaves = (*PREPARED, VALID)

    def __init__(self, precision: HalfPrecision, *, half_io: bool = False, keep: Mapping[str, str] | None = None) -> None:
        self.precision = precision
        self.half_io = half_io
        self.keep = keep or {}
        self.exclusions: list[Exclusion] = []
        self.needs = (*PREPARED, opset_from(OPSET[precision]))

    def call(self, model: ir.Model) -> PassResult:
        graph, keep = model.graph, self.keep
        plan = plan_half(model, self.precision)
        if unknown := set(keep) - {node.name for node in graph}:
            raise PrecisionError(f"no node is named {', '.join(map(repr, sorted(unknown)))}: nothing to keep in FP32")
        ports = {node: indices for node, indices in plan.half.items() if node.name not in keep}
        changes = bool(ports) or (self.half_io and any(map(is_float, (*graph.inputs, *graph.outputs))))
        _Conversion(graph, self.precision, ports).run(half_io=self.half_io)
        stay = {**plan.stay, **keep}
        self.exclusions = [Exclusion(node=node.name, reason=stay[node.name]) for node in graph if node.name and node.name in stay]
        return PassResult(model, changes)


class _Conversion:
    """Changes the types in one graph in place, and inserts the Casts."""

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
                    value.type = ir.TensorType(self.half)
        for node, ports in self.ports.items():
            for index in ports.outputs:
                node.outputs[index].type = ir.TensorType(self.half)
        uses = {value: list(value.uses()) for value in floats}  # before Casts are inserted
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
            # Nothing needs it in FP32.
            value.const_value = self._rounded(value)
            value.type = ir.TensorType(self.half)
            return
        if value not in self.twins:
            if value.is_initializer():
                self.twins[value] = self._initializer_twin(value)
            else:
                self.twins[value] = self._cast(value, self._new_name(value))
        for node, index in others:
            node.replace_input_with(index, self.twins[value])

    def _wanted(self, node: ir.Node, index: int, value: ir.Value) -> ir.DataType | None:
        """The type in which `node` takes the float `value`."""
        if node.op_type in ANY_TYPE and node.domain in STANDARD:
            return value.dtype
        ports = self.ports.get(node)
        return self.half if ports is not None and index in ports.inputs else FLOAT

    def _output_twin(self, value: ir.Value) -> ir.Value:
        """A Cast of `value` that takes over its name, because graph outputs keep their names; `value` is renamed."""
        if value not in self.twins:
            name = value.name or ""
            value.name = self._claim(f"{name}_{'fp32' if value.dtype == FLOAT else self.precision}")
            self.twins[value] = self._cast(value, name)
        return self.twins[value]

    def _cast(self, value: ir.Value, name: str) -> ir.Value:
        """`value` in the other type, called `name`, from a Cast right after its producer."""
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
    """Inputs, initializers and node outputs of the graph itself, not of its subgraphs."""
    return [
        *graph.inputs,
        *graph.initializers.values(),
        *(value for node in graph for value in node.outputs if value.name),
    ]
