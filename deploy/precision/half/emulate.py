"""A half-precision graph as an FP32 graph that computes the same.

ONNX Runtime's CPU kernels compute FP16 graphs in FP32 from one end to the other and so hide overflows, and have no BF16.
Here every tensor that is in half precision is rounded to it and back where it is made: half storage and FP32
accumulation, as tensor cores have it. An overflow is an infinity, as on the GPU.
"""

import numpy as np
import onnx
import onnx_ir as ir

from deploy.precision.graph import unused

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """The FP32 graph that emulates a graph of `to_half`. Its inputs and outputs have the same names and are FP32.

    A tensor is rounded by a pair of Casts, which ONNX Runtime keeps (a test holds it to that): the first is not exact.
    """
    result = ir.from_proto(model)
    graph = result.graph
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in graph.all_nodes() for value in node.outputs}
    for value in graph.initializers.values():
        if value.dtype in _HALVES and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = ir.DataType.FLOAT
    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        if value.dtype in _HALVES:
            _round(graph, value, taken)
    return ir.to_proto(result)


def _round(graph: ir.Graph, value: ir.Value, taken: set[str | None]) -> None:
    """Make `value` FP32 and put its rounded form in its place everywhere; that of a node's output takes over its name."""
    half = value.dtype
    assert half is not None
    producer = value.producer()
    uses = list(value.uses())
    name = value.name or ""
    float_type = ir.TensorType(ir.DataType.FLOAT)
    stored = ir.Value(name=unused(f"{name}_stored", taken), shape=value.shape, type=ir.TensorType(half))
    other = unused(f"{name}_rounded" if producer is None else f"{name}_exact", taken)
    taken |= {stored.name, other}
    value.dtype = ir.DataType.FLOAT
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
    elif len(graph):  # an input that is an output as well is passed through as it is
        graph.insert_before(graph[0], casts)
