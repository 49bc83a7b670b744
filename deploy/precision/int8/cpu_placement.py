"""Where further Q/DQ pairs go so that ONNX Runtime computes on codes from the input to the output.

TensorRT and OpenVINO quantize what a layer reads. ONNX Runtime fuses a layer, a sum or a product into one kernel on codes only
where its output is quantized too (onnxruntime/core/optimizer/qdq_transformer/selectors_actions; seen with 1.32): else it computes
in FP32 and spends its time on the pairs.
"""

from collections.abc import Collection
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes import PassResult

from deploy.precision.graph import STANDARD, unused
from deploy.precision.half.plan import is_float
from deploy.precision.int8.branches import branched_nodes
from deploy.precision.int8.edit import graph_of
from deploy.precision.int8.placement import PASS_THROUGH, Placement
from deploy.precision.passes import PREPARED, VALID, PrecisionPass

_ABSORBED = ("Clip", "Relu")
"""Activations that rounding to unsigned codes computes as well, where they end where the codes do."""

_POOLS = ("AveragePool", "GlobalAveragePool")

_UNARY = ("LeakyRelu", "Sigmoid")
"""Further operators of one input with a kernel on codes."""

_GATES = ("HardSigmoid", "Sigmoid")
"""Operators whose outputs lie between 0 and 1, and are multiplied with others."""


def widened(model: ir.Model, placement: Placement) -> Placement:
    """`placement` with the pairs behind layers, sums and products.

    model: prepared, FP32, of one scope (`deploy.precision.int8.branches`). The outputs of the graph and of its branches stay as they
    are, and so do those of Gemm and MatMul, which have kernels from codes to floating point. What the placement has left in floating
    point reads and makes no codes here either; a layer that only such nodes read has no kernel on codes then, and its weight stays in
    floating point too: it would be dequantized again at every run.
    """
    return _Widening(model.graph, placement).result()


class _Widening:
    def __init__(self, graph: ir.Graph, placement: Placement) -> None:
        self._graph = graph
        self._inputs = graph.inputs
        self._nodes = {node: node.name in placement.left for node in branched_nodes(graph)}
        self._placement = placement
        self._edges = dict(placement.edges)
        self._joined = set(placement.joints.values())
        self._made: set[str] = set()  # by kernels on codes

    def result(self) -> Placement:
        groups = [list(group) for group in self._placement.groups]
        for node, left in self._nodes.items():
            if not left:
                self._widen(node)
        for node in reversed(self._nodes):
            source = node.inputs[0] if node.inputs else None
            if source is None or not _is(node, PASS_THROUGH) or not self._has_codes(node.outputs[0]):
                continue
            if (self._has_codes(source) or self._quantize(source)) and source.name not in self._placement.edges:
                groups.append([source.name or "", node.outputs[0].name or ""])
        order = [*self._inputs, *(value for node in self._nodes for value in node.outputs)]
        names = [value.name or "" for value in order]
        found = replace(
            self._placement,
            edges={name: self._edges[name] for name in names if name in self._edges},
            groups=_merged(groups),
        )
        slow = {node.name or "" for node in self._nodes if node.name in found.weights and not self._has_kernel(node)}
        if not slow:
            return found
        edges = {
            name: uses
            for name, uses in self._placement.edges.items()
            if name in self._made or not slow.issuperset(user for user, _ in uses)
        }
        weights = {name: weight for name, weight in found.weights.items() if name not in slow}
        nodes = tuple(name for name in found.nodes if name not in slow)
        return _Widening(self._graph, replace(self._placement, nodes=nodes, weights=weights, edges=edges)).result()

    def _has_kernel(self, node: ir.Node) -> bool:
        """Whether ONNX Runtime computes a layer on codes: Conv with those behind it alone, others unless there is an activation alone
        between them and what reads floating point (seen with 1.32)."""
        behind = self._behind(node.outputs[0])
        return self._has_codes(behind) or not (
            _is(node, ("Conv",)) or (behind is not node.outputs[0] and not behind.is_graph_output())
        )

    def _widen(self, node: ir.Node) -> None:
        """Give the output of `node` codes, and what it reads where that has none, if there is a kernel on codes for it."""
        both = _is(node, ("Add", "Mul"))
        operands = [value for value in node.inputs[: 2 if both else 1] if value is not None]
        if both:
            fused = any(map(self._has_codes, operands)) and all(map(self._may_have, operands))
        else:
            fused = _is(node, _POOLS)
            fused |= _is(node, ("Conv",)) and node.name in self._placement.nodes
            fused |= _is(node, _UNARY) and self._has_codes(operands[0])
        behind = self._behind(node.outputs[0])
        if fused and self._quantize(behind):
            self._made.add(behind.name or "")
            for value in operands:
                if not self._has_codes(value):
                    self._quantize(value)

    def _behind(self, value: ir.Value) -> ir.Value:
        """What is rounded in place of `value`: the output of the activation behind it."""
        while len(uses := value.uses()) == 1 and not value.is_graph_output():
            node = next(iter(uses))[0]
            if not _is(node, _ABSORBED):
                break
            value = node.outputs[0]
        return value

    def _has_codes(self, value: ir.Value) -> bool:
        return value.name in self._edges or value.name in self._joined

    def _may_have(self, value: ir.Value) -> bool:
        maker = value.producer()
        return self._has_codes(value) or (maker is not None and _is(maker, _GATES) and not value.is_graph_output())

    def _quantize(self, value: ir.Value) -> bool:
        """Give all that read `value` its codes, but for what is left in floating point; returns whether that can be."""
        if value.is_graph_output() or value.name in self._joined:
            return False
        uses = [(node.name or "", index) for node, index in value.uses() if self._nodes.get(node) is False]
        if uses:
            self._edges[value.name or ""] = tuple(uses)
        return bool(uses)


def _merged(groups: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    """The groups, of which those that have a tensor in common are one."""
    found: list[list[str]] = []
    for group in groups:
        apart = [other for other in found if not set(other) & set(group)]
        joined = [name for other in found if set(other) & set(group) for name in other]
        found = [*apart, list(dict.fromkeys([*joined, *group]))]
    return tuple(map(tuple, found))


def _is(node: ir.Node, operators: Collection[str]) -> bool:
    return node.op_type in operators and node.domain in STANDARD


class MeansToPools(PrecisionPass):
    """The same computation with GlobalAveragePool, which has a kernel on codes, for every ReduceMean over all places of maps."""

    needs = PREPARED
    leaves = (*PREPARED, VALID)

    def call(self, model: ir.Model) -> PassResult:
        found = [node for node in branched_nodes(model.graph) if _is(node, ("ReduceMean",)) and _over_places(node)]
        for node in found:
            _pool(model.graph, node)
        return PassResult(model, bool(found))


def _over_places(node: ir.Node) -> bool:
    value, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or value.shape is None or not is_float(value) or axes is None or axes.const_value is None:
        return False
    rank = len(value.shape)
    return rank > 2 and sorted(axis % rank for axis in axes.const_value.numpy().tolist()) == list(range(2, rank))


def _pool(graph: ir.Graph, node: ir.Node) -> None:
    value, axes, result = node.inputs[0], node.inputs[1], node.outputs[0]
    assert value is not None
    assert value.shape is not None
    taken = {each.name for each in graph.all_nodes()} | {each.name for every in graph.all_nodes() for each in every.outputs}
    if node.attributes.get_int("keepdims", 1):
        pool = ir.Node("", "GlobalAveragePool", [value], outputs=[ir.Value()], name=node.name)
        new = [pool]
    else:
        shape = ir.Shape([*value.shape[:2], *[1] * (len(value.shape) - 2)])
        kept = ir.Value(name=unused(f"{result.name}_places", taken), shape=shape, type=value.type)
        pool = ir.Node("", "GlobalAveragePool", [value], outputs=[kept], name=node.name)
        squeeze = ir.Node("", "Squeeze", [kept, axes], outputs=[ir.Value()], name=unused(f"{node.name}/Squeeze", taken))
        new = [pool, squeeze]
    last = new[-1].outputs[0]
    last.shape, last.type = result.shape, result.type
    ir.convenience.replace_nodes_and_values(graph_of(node), node, [node], new, [result], [last])
