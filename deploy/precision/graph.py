"""Helpers for ONNX graphs that the precision passes and analyses share."""

import itertools
from collections.abc import Collection

import onnx
import onnx_ir as ir

STANDARD = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""


def unknown_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes of the main graph whose operator is defined neither by ONNX nor by the model itself."""
    local = {(function.domain, function.name) for function in model.functions.values()}
    return [
        node
        for node in model.graph
        if (node.domain, node.op_type) not in local
        and not onnx.defs.has(node.op_type, "" if node.domain in STANDARD else node.domain)
    ]


def inner_nodes(node: ir.Node) -> list[ir.Node]:
    """All nodes in the subgraphs of `node`, at any depth."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return [inner for graph in graphs for inner in graph.all_nodes()]


def first_line(error: BaseException) -> str:
    """The first line of the message of the innermost error, which is the most specific one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unused(name: str, taken: Collection[str | None]) -> str:
    """`name`, or `name` with the first free number appended if it is taken."""
    return next(candidate for n in itertools.count(1) if (candidate := name if n == 1 else f"{name}_{n}") not in taken)


def opset_version(model: ir.Model) -> int:
    """The version of ONNX's own operators that the graph uses."""
    return model.opset_imports.get("", 1)
