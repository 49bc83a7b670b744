"""The contract of a precision pass: it changes an `onnx_ir` model in place, and states what it needs and what it leaves.

A pass is called with a model and returns onnx_ir's `PassResult`: the model, and whether anything was changed. Whatever
else it finds out (equalized layers, excluded nodes) is a typed attribute of the pass, set by the call. A model and its
`clone()` share tensors and types: a pass assigns a new `const_value` or `type` to a value and never changes the old one.

The conditions are checked here, before and after every call. The code that chains passes must make sure that they hold:
a violation is a bug of ours and is raised as onnx_ir's PreconditionError or PostconditionError, never as a DeployError.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PostconditionError, PreconditionError
from onnx_ir.passes.common import CheckerPass

from deploy.artifact.accepted import refusal
from deploy.artifact.onnxshapes import slim_proto
from deploy.precision.graph import STANDARD, first_line, opset_version


@dataclass(frozen=True)
class Condition:
    """A property that a model may have.

    name: the property, as in "every node has its own name".
    violation: returns what is wrong with a model that does not have it; "" for one that does.
    """

    name: str
    violation: Callable[[ir.Model], str]


class PrecisionPass(InPlacePass):
    """Base class of all precision passes. A subclass names its conditions and implements `call`.

    needs: conditions that must hold before the pass runs.
    leaves: conditions that hold afterwards.
    """

    needs: tuple[Condition, ...] = ()
    leaves: tuple[Condition, ...] = ()

    @final
    def requires(self, model: ir.Model) -> None:
        for condition in self.needs:
            if violation := condition.violation(model):
                raise PreconditionError(f"the pass {type(self).__name__} needs that {condition.name}: {violation}")

    @final
    def ensures(self, model: ir.Model) -> None:
        for condition in self.leaves:
            if violation := condition.violation(model):
                raise PostconditionError(f"the pass {type(self).__name__} must ensure that {condition.name}: {violation}")


def opset_from(version: int) -> Condition:
    """The condition that the graph uses `version` of ONNX's own operators, or a later one."""

    def violation(model: ir.Model) -> str:
        return "" if opset_version(model) >= version else f"the graph uses opset {opset_version(model)}"

    return Condition(f"the opset is {version} or later", violation)


def _functions(model: ir.Model) -> str:
    return ", ".join(f"{function.domain}:{function.name} is left" for function in model.functions.values())


def _unnamed(model: ir.Model) -> str:
    names = Counter(node.name or "" for node in model.graph.all_nodes())
    if names[""]:
        return f"{names['']} nodes have none"
    return next((f"{count} nodes are called {name!r}" for name, count in names.items() if count > 1), "")


def _hidden_constants(model: ir.Model) -> str:
    for node in model.graph:
        if node.op_type == "Constant" and node.domain in STANDARD and not node.outputs[0].is_graph_output():
            return f"node {node.name!r} is a Constant"
    names = [value.name for value in model.graph.inputs if value.is_initializer()]
    return f"{names[0]!r} is an input as well" if names else ""


def _invalid(model: ir.Model) -> str:
    try:
        CheckerPass(full_check=True)(model)
    except Exception as error:  # the checker, protobuf and shape inference raise errors of several families
        return first_line(error) if refusal(slim_proto(model).SerializeToString()) else ""
    return ""


INLINED = Condition("local functions are inlined", _functions)
NAMED = Condition("every node has its own name", _unnamed)
CONSTANTS = Condition("constants are initializers and not inputs or nodes", _hidden_constants)
VALID = Condition("the graph is valid ONNX", _invalid)
"""Checked by onnx.checker with type and shape inference, without the large weights, so that no model is too large.

What ONNX Runtime takes all the same is valid too.
"""

PREPARED = (INLINED, NAMED, CONSTANTS)
"""The form that the passes work on: what `deploy.precision.prepare.Prepare` leaves."""
