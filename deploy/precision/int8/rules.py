"""Layers that INT8 is not for, although it could be: a line a rule, with its source. The option `include` overrules it."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from deploy.precision.graph import STANDARD

_BETWEEN = frozenset(
    (
        "Add", "Cast", "Div", "Dropout", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
    )
)  # fmt: skip
"""Operators between the products of attention and their Softmax: they scale, mask, move or select."""

_STEPS = 6
"""As far as a Softmax is looked for."""


@dataclass(frozen=True)
class Rule:
    """reason: why the layer stays in floating point. source: who says so. applies: to a node that could be quantized."""

    reason: str
    source: str
    applies: Callable[[ir.Node], bool]


def _attends(node: ir.Node) -> bool:
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


RULES = (
    Rule(
        "it is a product of attention, which is fused as a whole in floating point",
        "docs/int8.md: probabilities use half of the codes, and lose 1.1 dB of a sentence encoder's 23.7",
        _attends,
    ),
)


def rule_for(node: ir.Node) -> Rule | None:
    """The first rule that leaves `node` in floating point."""
    return next((rule for rule in RULES if rule.applies(node)), None)
