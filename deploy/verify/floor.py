"""The noise floor: what rounding in B's number formats does to A's own layers, measured by rounding at random.

Monte Carlo arithmetic (Parker 1997, "Monte Carlo Arithmetic", UCLA): a result is computed with each operand and result changed by
a random amount of at most half a unit in its last place. How far it moves is what rounding may do there, whatever the order of the
sums and the kernels; it is measured on the data, layer by layer, and not guessed.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from deploy.verify.graphs import Graph, dequantized

_HALF_ULP = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""The largest relative error of rounding to nearest: 24, 11 and 8 significant bits."""

_LEVELS = 127
"""The steps of INT8 on either side of 0."""

_FLOAT = ir.DataType.FLOAT

SEEDS = 2
"""How often A is rounded at random; the squares of the errors are averaged."""


class _Noise:
    """Adds nodes to a graph that change tensors at random."""

    def __init__(self, graph: ir.Graph, seed: int) -> None:
        self._graph = graph
        self._numbers = itertools.count(seed * 1_000_003 + 1)

    def _random(self, value: ir.Value, most: float) -> ir.Node:
        """Uniform between -most and most, of the shape of `value`."""
        number = next(self._numbers)
        attributes = {"low": -most, "high": most, "seed": float(number % 16_000_000), "dtype": int(_FLOAT)}
        return ir.node("RandomUniformLike", [value], attributes, name=f"noise/{number}")

    def relative(self, value: ir.Value, most: float) -> list[ir.Node]:
        """`value` times 1 and up to `most`."""
        random = self._random(value, most)
        share = ir.node("Mul", [value, random.outputs[0]], name=f"{random.name}/share")
        return self._named([random, share, ir.node("Add", [value, share.outputs[0]], name=f"{random.name}/sum")])

    def steps(self, value: ir.Value, step: np.ndarray) -> list[ir.Node]:
        """`value` and up to half of `step`, which can be broadcast to it."""
        random = self._random(value, 0.5)
        constant = ir.Value(
            name=f"{random.name}/step", const_value=ir.tensor(step.astype(np.float32), name=f"{random.name}/step")
        )
        constant.type = ir.TensorType(_FLOAT)
        constant.shape = ir.Shape(step.shape)
        self._graph.register_initializer(constant)
        share = ir.node("Mul", [random.outputs[0], constant], name=f"{random.name}/share")
        return self._named([random, share, ir.node("Add", [value, share.outputs[0]], name=f"{random.name}/sum")])

    @staticmethod
    def _named(nodes: list[ir.Node]) -> list[ir.Node]:
        for node in nodes:
            node.outputs[0].name = f"{node.name}/value"
            node.outputs[0].type = ir.TensorType(_FLOAT)
        return nodes


def noisy(a: Graph, b: Graph, amax: Mapping[str, float], seed: int) -> ir.Model:
    """A's graph with random rounding wherever B rounds, in B's formats.

    Operands that B quantizes move by up to half a step of `amax`/127, the largest magnitude of the tensor, and its weights by half a
    step of theirs; all else by half a unit in the last place of the format that B stores it in. So nothing of B's own scales,
    zero points and weights is taken over.
    """
    model = a.model.clone()
    noise = _Noise(model.graph, seed)
    theirs = {node.name: node for node in b.model.graph}
    sizes = _sizes(model.graph)
    for node in list(model.graph):
        other = theirs.get(node.name)
        weights = {index for index, value in enumerate(node.inputs) if value is not None and value.const_value is not None}
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != _FLOAT or (index in weights and len(weights) == len(node.inputs)):
                continue
            if value in sizes:
                continue
            quantized = None if other is None else dequantized(other, index)
            name = value.name or ""
            if index in weights:
                assert value.const_value is not None
                array = value.const_value.numpy()
                if array.size == 1:
                    continue
                if quantized is None:
                    changed = noise.relative(value, _HALF_ULP["fp32" if other is None else _format(other, b)])
                else:
                    changed = noise.steps(value, _weight_step(array, quantized))
            elif quantized is not None and name in amax:
                changed = noise.steps(value, np.array(amax[name] / _LEVELS))
            else:
                continue
            model.graph.insert_before(node, changed)
            node.replace_input_with(index, changed[-1].outputs[0])
        for value in node.outputs:
            if value.dtype == _FLOAT and value.name and value not in sizes:
                _behind(model.graph, node, value, noise, _HALF_ULP[b.halves.get(value.name, "fp32")])
    return model


def _sizes(graph: ir.Graph) -> set[ir.Value]:
    """What is computed from sizes and constants alone, and the scales of a Resize: other numbers there make other shapes."""
    sizes: set[ir.Value] = set()
    for node in graph:
        read = [value for value in node.inputs if value is not None and value.const_value is None]
        if node.op_type in ("Shape", "Size") or (read and sizes.issuperset(read)):
            sizes.update(node.outputs)
        if node.op_type in ("Resize", "Upsample"):
            sizes.update(value for value in node.inputs[1:] if value is not None)
    return sizes


def _behind(graph: ir.Graph, node: ir.Node, value: ir.Value, noise: _Noise, most: float) -> None:
    """Put `value` times 1 and up to `most` in its place, under its name."""
    uses = list(value.uses())
    nodes = noise.relative(value, most)
    last = nodes[-1].outputs[0]
    last.name, value.name = value.name, f"{value.name}/exact"
    last.shape = value.shape
    graph.insert_after(node, nodes)
    for user, index in uses:
        user.replace_input_with(index, last)
    graph.outputs[:] = [last if output is value else output for output in graph.outputs]


def _format(node: ir.Node, b: Graph) -> str:
    """The format that a node of B computes in, by what it gives."""
    return next((b.halves[value.name] for value in node.outputs if value.name is not None and value.name in b.halves), "fp32")


def _weight_step(array: np.ndarray, dequantize: ir.Node) -> np.ndarray:
    """The step of a weight by its own largest magnitude, along the axis that B has scales along."""
    scale = dequantize.inputs[1]
    axis = dequantize.attributes.get_int("axis", 1)
    if scale is None or scale.const_value is None or scale.const_value.size == 1 or scale.const_value.size != array.shape[axis]:
        return np.asarray(np.abs(array).max() / _LEVELS)
    others = tuple(dim for dim in range(array.ndim) if dim != axis % array.ndim)
    return np.asarray(np.abs(array).max(axis=others, keepdims=True) / _LEVELS)


def before_bias(a: Graph, b: Graph) -> set[str]:
    """The products that B quantizes and that a bias alone is added to, by the names of their tensors.

    That bias may take back the mean error of the product, so that both are one layer, and its floor that of the two.
    """
    theirs = {node.name: node for node in b.model.graph}
    found: set[str] = set()
    for node in a.model.graph:
        other, value = theirs.get(node.name), node.outputs[0]
        uses = list(value.uses())
        if other is None or len(uses) != 1 or value.is_graph_output() or not value.name:
            continue
        reader = uses[0].node
        biased = reader.op_type == "Add" and any(each is not None and each.const_value is not None for each in reader.inputs)
        if biased and any(dequantized(other, index) for index in range(len(other.inputs))):
            found.add(value.name)
    return found
