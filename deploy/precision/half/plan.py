"""Which nodes of an ONNX graph can run in half precision, by the definitions of their operators."""

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from deploy.precision.graph import STANDARD, inner_nodes, opset_version
from deploy.precision.half.options import HalfPrecision

FLOAT = ir.DataType.FLOAT
HALF: dict[HalfPrecision, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_SHAPES = ("Shape", "Size")
"""Operators that use only the shape of their input, not its numbers."""

ANY_TYPE = (*_SHAPES, "Cast")
"""Operators that take an input of any type, and whose output type does not depend on it."""

_GENERATORS = frozenset(
    ("Bernoulli", "Constant", "EyeLike", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)
"""Operators whose output type is an attribute, or depends on the input in a way that their definition does not express."""

_WIDE_INSIDE = frozenset(
    ("GlobalLpPool", "LpNormalization", "LpPool", "MeanVarianceNormalization", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp")
)
"""Operators that TensorRT and others compute in steps (squares or exponentials, their sum, the root or logarithm). Each step
is rounded to half precision, so that they can overflow inside although inputs and outputs are small."""

_NOT_IN_TENSORRT: dict[HalfPrecision, frozenset[str]] = {
    "fp16": frozenset(),
    "bf16": frozenset(("ConvTranspose", "HardSwish", "Mish")),
}
"""Operators that ONNX defines for the type but TensorRT rejects in it (seen with TensorRT-RTX 1.7)."""


@dataclass(frozen=True)
class Ports:
    """Indices of the inputs and outputs of a node that are in half precision if the node is converted."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which nodes can run in half precision, and by node name the reason why other nodes with floats cannot."""

    half: dict[ir.Node, Ports]
    stay: dict[str, str]


def round_to(array: np.ndarray, precision: HalfPrecision) -> np.ndarray:
    """`array` rounded to nearest even in half precision: dtype float16 or ml_dtypes' bfloat16; overflow is infinite."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return array.astype(np.float16 if precision == "fp16" else ml_dtypes.bfloat16)


def plan_half(model: ir.Model, precision: HalfPrecision) -> Plan:
    """Which nodes of a prepared graph can run in half precision, by the definitions of their operators."""
    plan = Plan({}, {})
    data = _data_values(model.graph)
    for node in model.graph:
        floats = [value for value in (*node.inputs, *node.outputs) if value is not None and is_float(value)]
        if not floats or (node.op_type in ANY_TYPE and node.domain in STANDARD):
            continue
        ports = _ports(node, opset_version(model), precision, data)
        if isinstance(ports, str):
            plan.stay[node.name or ""] = ports
        else:
            plan.half[node] = ports
    return plan


def _ports(node: ir.Node, opset: int, precision: HalfPrecision, data: set[ir.Value]) -> Ports | str:
    """The inputs and outputs of `node` that can be in half precision, or the reason why none can."""
    if node.domain not in STANDARD:
        return f"{node.op_type} of the domain {node.domain!r} is not an ONNX operator"
    if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
        return f"{node.op_type} has subgraphs, which stay FP32"
    if node.op_type in _GENERATORS:
        return f"{node.op_type} generates its values"
    if node.op_type in _NOT_IN_TENSORRT[precision]:
        return f"TensorRT has no {node.op_type} in {precision.upper()}"
    if precision == "fp16" and node.op_type in _WIDE_INSIDE:
        return f"{node.op_type} may overflow in its intermediate steps"
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
    unclear = next((value.name for value in values if not isinstance(value.type, ir.TensorType)), None)
    if unclear is not None:
        return f"the type of {unclear!r} is not known to be a tensor"
    if not any(value in data for value in node.inputs if value is not None):
        return "computes on shapes and constants only"
    if not onnx.defs.has(node.op_type, opset, ""):
        return f"opset {opset} of ONNX has no {node.op_type}"
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    typestr = f"tensor({HALF[precision].name.lower()})"
    variables = {entry.type_param_str for entry in schema.type_constraints if typestr in entry.allowed_type_strs}
    inputs = tuple(
        index
        for index, value in enumerate(node.inputs)
        if value is not None and is_float(value) and _formal(schema.inputs, index) in variables
    )
    if not inputs:
        return f"{node.op_type} has no {precision.upper()} form in opset {opset}"
    converted = {_formal(schema.inputs, index) for index in inputs}
    if node.op_type == "DequantizeLinear":  # of the type of its scale; since opset 23 its definition has a variable of its own
        converted.update(parameter.type_str for parameter in schema.outputs)
    outputs = tuple(
        index for index, value in enumerate(node.outputs) if is_float(value) and _formal(schema.outputs, index) in converted
    )
    return Ports(inputs, outputs)


def _formal(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """Type variable of the parameter at `index`. If there are more arguments than parameters, the last one is variadic."""
    return parameters[min(index, len(parameters) - 1)].type_str


def is_float(value: ir.Value) -> bool:
    """Whether a value is a float32 tensor."""
    return isinstance(value.type, ir.TensorType) and value.dtype == FLOAT


def _data_values(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on the content of inputs or weights, not only on shapes and single numbers.

    Arithmetic on sizes (the size of a resized image, positions in it) is exact in FP32 but not in FP16, which has no odd
    numbers above 2048. Leaving it in FP32 costs nothing.
    """
    data = set(graph.inputs)
    weights = (FLOAT, ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)  # quantized weights pass through DequantizeLinear
    data |= {value for value in graph.initializers.values() if value.dtype in weights and _size(value) > 1}
    for node in graph:
        if node.op_type in _SHAPES and node.domain in STANDARD:
            continue
        captured = [value for inner in inner_nodes(node) for value in inner.inputs]
        if any(value in data for value in (*node.inputs, *captured) if value is not None):
            data.update(node.outputs)
    return data


def _size(value: ir.Value) -> int:
    return value.const_value.size if value.const_value is not None else 0
