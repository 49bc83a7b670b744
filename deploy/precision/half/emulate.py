"""The pass that turns a half-precision graph into an FP32 graph that computes the same.

ONNX Runtime's CPU kernels compute an FP16 graph in FP32 from end to end, which hides overflows, and do not support BF16.
Here every tensor that is in half precision is rounded to it and back right after it is computed: half-precision storage
and FP32 accumulation, as on tensor cores. An overflow becomes an infinity, as on the GPU.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from deploy.precision.graph import unused
from deploy.precision.passes import PREPARED, Condition, PrecisionPass

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _half_operand(model: ir.Model) -> str:
    for node in model.graph:
        if node.op_type != "Cast":
            half = next((value for value in node.inputs if value is not None and value.dtype in _HALVES), None)
            if half is not None:
                return f"{half.name!r}, an input of {node.name!r}, is {half.dtype}"
    return ""


EMULATED = Condition("no operator but Cast takes half precision", _half_operand)


class Emulate(PrecisionPass):
    """Turn a graph in half precision into an FP32 graph whose inputs and outputs have the same names and are FP32.

    A tensor is rounded by a pair of Casts, which ONNX Runtime does not remove (a test checks that): the first is not exact.
    """

    needs = PREPARED
    leaves = (EMULATED,)

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
        taken |= {value.name for node in graph.all_nodes() for value in node.outputs}
        weights = [value for value in graph.initializers.values() if value.dtype in _HALVES]
        for value in weights:
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
        computed = [*graph.inputs, *(value for node in graph for value in node.outputs)]
        halves = [value for value in computed if value.name and value.dtype in _HALVES]  # an output left out has no name
        for value in halves:
            _round(graph, value, taken)
        return PassResult(model, bool(weights or halves))


def _round(graph: ir.Graph, value: ir.Value, taken: set[str | None]) -> None:
    """Make `value` FP32 and replace it by its rounded form everywhere, which takes over the name of a node's output."""
    half = value.dtype
    assert half is not None
    producer = value.producer()
    uses = list(value.uses())
    name = value.name or ""
    float_type = ir.TensorType(ir.DataType.FLOAT)
    stored = ir.Value(name=unused(f"{name}_stored", taken), shape=value.shape, type=ir.TensorType(half))
    other = unused(f"{name}_rounded" if producer is None else f"{name}_exact", taken)
    taken |= {stored.name, other}
    value.type = float_type
    if producer is not None:
        value.name = other
        if producer.op_type == "Cast" and producer.domain == "":
            producer.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    rounded = ir.Value(name=other if producer is None else name, shape=value.shape, type=float_type)
    casts = [
        ir.Node("", "Cast", [value], [ir.AttrInt64("to", half)], outputs=[stored]),
        ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.FLOAT)], outputs=[rounded]),
    ]
    for node, index in uses:
        node.replace_input_with(index, rounded)
    if producer is not None:
        graph.insert_after(producer, casts)
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = rounded
    elif len(graph):  # an input that is also an output is passed through unchanged
        graph.insert_before(graph[0], casts)
