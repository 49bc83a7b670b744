"""Layers that quantization is not for, although they could be: a line a rule, with its source. The option `include` overrules it.

Some rules are for engines alone: they leave out what TensorRT has no fast kernels for, in shapes that only an engine fixes. A file
of `quantize` is for the CPU too, where these layers are faster in INT8.
"""

import logging
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from deploy.artifact.onnxshapes import with_sizes
from deploy.artifact.tensors import Profile
from deploy.precision.codes import CodesName
from deploy.precision.graph import STANDARD

logger = logging.getLogger(__name__)

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply and accumulate."""

_BETWEEN = frozenset(
    (
        "Add", "Cast", "Div", "Dropout", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
    )
)  # fmt: skip
"""Operators between the products of attention and their Softmax: they scale, mask, move or select."""

_STEPS = 6
"""As far as a Softmax is looked for."""


_NVIDIA = "NVIDIA Model-Optimizer, modelopt/onnx/quantization/graph_utils.py, August 2026: "
_LEAST = 16
"""Numbers that a product must add up and give, and channels of a convolution: what a tensor core takes at once."""
_PACKED = 8
"""Channels of INT8 that a convolution of fewer than `_LEAST` must be a multiple of."""

Sizes = Mapping[str, tuple[int, ...]]
"""The shape of every value, by name, at the optimum of the engine that a graph is for."""


@dataclass(frozen=True)
class Rule:
    """reason: why the layer stays in floating point. source: who says so. applies: to a node that could be quantized.

    codes: what it could be quantized to. engine: the rule is for engines alone, whose sizes it may look at.
    """

    reason: str
    source: str
    applies: Callable[[ir.Node, Sizes], bool]
    codes: tuple[CodesName, ...] = ("int8", "fp8")
    engine: bool = False


def _attends(node: ir.Node, _: Sizes) -> bool:
    """Whether `node` is a product of queries and keys, or of the probabilities and values."""
    second = node.inputs[1] if node.op_type == "MatMul" else None
    if second is None or second.is_initializer():
        return False
    return _finds_softmax(node.inputs[0], back=True) or _finds_softmax(node.outputs[0], back=False)


def _finds_softmax(value: ir.Value | None, *, back: bool) -> bool:
    front = [value]
    for _ in range(_STEPS):
        found: list[ir.Node] = []
        for each in front:
            if each is not None:
                maker = each.producer()
                found += ([maker] if maker is not None else []) if back else [user for user, _ in each.uses()]
        if any(node.op_type == "Softmax" and node.domain in STANDARD for node in found):
            return True
        passed = [node for node in found if node.op_type in _BETWEEN and node.domain in STANDARD]
        front = [each for node in passed for each in (node.inputs if back else node.outputs)]
    return False


def _is_no_product(node: ir.Node, _: Sizes) -> bool:
    """Whether `node` is something else than a Gemm or MatMul with a weight."""
    return node.op_type not in ("Gemm", "MatMul") or not _has_weight(node)


def _is_vector_product(node: ir.Node, sizes: Sizes) -> bool:
    """Whether a product has one row or gives one column; those of a stack of matrices count as rows, where there is a weight."""
    result = sizes.get(node.outputs[0].name or "")
    if node.op_type not in ("Gemm", "MatMul") or result is None or len(result) < 2:
        return False
    return (len(result) == 2 or not _has_weight(node)) and 1 in result[-2:]


def _is_small_product(node: ir.Node, sizes: Sizes) -> bool:
    result, second = sizes.get(node.outputs[0].name or ""), _shape(node.inputs[1], sizes)
    if node.op_type not in ("Gemm", "MatMul") or result is None or len(result) < 2 or second is None or len(second) < 2:
        return False
    summed = second[-1 if node.attributes.get_int("transB", 0) else -2]
    return min(summed, result[-1]) < _LEAST


def _has_few_channels(node: ir.Node, sizes: Sizes) -> bool:
    """Whether a convolution has few channels, and is none of those that there are kernels for all the same."""
    weight = _shape(node.inputs[1], sizes) if node.op_type == "Conv" else None
    if weight is None or min(weight[:2]) >= _LEAST:
        return False
    made, taken, *kernel = weight
    if node.attributes.get_int("group", 1) > 1:
        return made % _PACKED != 0 or min(kernel) < 3
    source = node.inputs[0]
    outer = source is not None and source.is_graph_input()
    packed = made % _PACKED == 0 or taken % _PACKED == 0
    return not (packed and (outer or max(made, taken) >= _LEAST) and len(set(kernel)) == 1)


def _has_weight(node: ir.Node) -> bool:
    second = node.inputs[1]
    return second is not None and second.is_initializer()


def _shape(value: ir.Value | None, sizes: Sizes) -> tuple[int, ...] | None:
    if value is None:
        return None
    return tuple(value.const_value.shape.numpy()) if value.const_value is not None else sizes.get(value.name or "")


RULES = (
    Rule(
        "it is a product of attention, which is fused as a whole in floating point",
        "docs/int8.md: probabilities use half of the codes, and lose 1.1 dB of a sentence encoder's 23.7",
        _attends,
    ),
    Rule(
        "FP8 is for Gemm and MatMul with weights",
        'TensorRT-RTX, "Working with Quantized Types": FP8 is only supported for matrix multiplications; TensorRT 10.6 and 10.7, release'
        " notes: a scale for each channel in FP8 GEMMs",
        _is_no_product,
        codes=("fp8",),
    ),
    Rule(
        "it multiplies by one vector, for which TensorRT has no fast kernels",
        _NVIDIA + "find_nodes_from_matmul_to_exclude, a product of one row or column cannot use tensor cores",
        _is_vector_product,
        engine=True,
    ),
    Rule(
        f"it adds up or gives fewer than {_LEAST} numbers, for which TensorRT has no fast kernels",
        _NVIDIA + "_MIN_MATMUL_DIM, kernels of INT8 and FP8 need K and N of 16 to be efficient",
        _is_small_product,
        engine=True,
    ),
    Rule(
        "it has too few channels for TensorRT's INT8 kernels",
        _NVIDIA + "find_nodes_from_convs_to_exclude, 16 channels in and out, or some of 8",
        _has_few_channels,
        codes=("int8",),
        engine=True,
    ),
)
"""NVIDIA's also leaves out products of attention over more than 512 positions: here the first rule leaves them all."""


def rule_for(node: ir.Node, codes: CodesName) -> Rule | None:
    """The first rule that leaves `node` in floating point in every file."""
    return next((rule for rule in RULES if not rule.engine and codes in rule.codes and rule.applies(node, {})), None)


def engine_rule_for(node: ir.Node, codes: CodesName, sizes: Sizes) -> Rule | None:
    """The first rule for engines that leaves `node` in floating point."""
    return next((rule for rule in RULES if rule.engine and codes in rule.codes and rule.applies(node, sizes)), None)


def slow_in_engine(
    model: ir.Model, layers: Collection[str], included: Container[str], codes: CodesName, profile: Profile
) -> dict[str, str]:
    """Those of the quantized `layers` that a rule for engines leaves in floating point, at the optimum of `profile`, with the reason.

    included: the names of those that no rule leaves out.

    None where that would leave nothing: what was asked for is more than what is fast.
    """
    sized = with_sizes(model, {name: shapes.opt for name, shapes in profile.items()})
    made = (value for node in sized.graph.all_nodes() for value in node.outputs)
    shapes = {value.name or "": value.shape for value in (*sized.graph.inputs, *made) if value.shape is not None}
    sizes = {name: shape.numpy() for name, shape in shapes.items() if shape.is_static()}
    nodes = {node.name or "": node for node in model.graph.all_nodes()}
    found = {
        name: rule.reason
        for name in layers
        if name not in included and (rule := engine_rule_for(nodes[name], codes, sizes)) is not None
    }
    if found and len(found) == len(layers):
        name, reason = next(iter(found.items()))
        logger.warning("no layer is for %s in an engine (%s: %s); they are quantized all the same", codes.upper(), name, reason)
        return {}
    return found
