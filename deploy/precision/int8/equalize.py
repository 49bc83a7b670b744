"""Cross-layer equalization: channels between two layers rescaled, so that each has the same range in both weights.

Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV
2019, arXiv:1906.04721, section 4.1. It spares the channels of small range when a whole tensor shares one scale. The
scaling commutes with every f for which f(s x) = s f(x) with s > 0: ReLU and pooling, but never ReLU6.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from deploy.precision.graph import STANDARD, check, unused

SWEEPS = 40
"""The most passes over all pairs."""

TOLERANCE = 1e-3
"""Equalized: no scale of a sweep is further from 1. A pair whose scales as a whole are as near to 1 is left as it is."""

SMALLEST, LARGEST = 2.0**-16, 2.0**16
"""The bounds of a channel's scale, all sweeps together."""

DOMINANCE = 4.0
"""How many times larger, against its channel's weights, a bias may be than the layer's median before it counts as a range.

A dead channel gives a constant, its bias, from weights next to nothing. Were they alone its range, equalization would blow
the constant up, and with it the range of the activations, in which all other channels drown.
"""

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_ELEMENTWISE = ("Relu", "LeakyRelu", "PRelu", "Dropout", "Identity")
_POOLING = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")
_OVER_AXES = ("ReduceMean", "ReduceMax", "Squeeze")


def equalize(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Equalize all pairs of Conv, ConvTranspose and Gemm of a prepared graph, BatchNorm folded; its results stay the same.

    A pair is joined by one path of Relu, LeakyRelu, PRelu, Dropout, Identity, pooling and reductions over other axes than
    the channels'; before a Gemm also by Flatten and Reshape that keep a channel's elements together. Each tensor on the
    path has one consumer and is no graph output. Weights are float32 initializers that no other node uses, and the first
    layer's bias is an initializer with a number a channel. Channel i of the first layer is divided by s_i, and multiplied in the second,
    with s_i = sqrt(r1_i r2_i) / r2_i (equation 11) and r the largest magnitude of the channel's weights; not from the
    paper: r1_i is no less than |bias_i| / (DOMINANCE m), m the median of |bias| / r1 over the layer's channels that are not
    dead. The pairs are gone through until no scale of a sweep is further than TOLERANCE from 1, SWEEPS times at most. A
    channel whose weights in either layer are all zero stays as it is, and so does one with NaN or an infinity; s_i stays
    between SMALLEST and LARGEST.

    Returns the graph and the names of the changed layers in its order. Raises PrecisionError when the result is not valid.
    """
    graph = ir.from_proto(model)
    pairs = _find_pairs(graph.graph)
    for _ in range(SWEEPS):
        if max((pair.sweep() for pair in pairs), default=0.0) < TOLERANCE:
            break
    changed: set[ir.Node] = set()
    for pair in pairs:
        if np.abs(pair.scales - 1).max() > TOLERANCE:
            pair.apply(graph.graph)
            changed |= {pair.first.node, pair.second.node}
    check(graph, "the equalized graph is not valid")
    return ir.to_proto(graph), tuple(node.name or "" for node in graph.graph if node in changed)


@dataclass
class _Layer:
    """A layer whose weight is seen as (groups, a, b, kernel): a the output channels of a group and b its inputs, or the reverse."""

    node: ir.Node
    weight: ir.Value
    blocks: tuple[int, int, int, int]
    output_axis: int  # 1 or 2
    magnitudes: np.ndarray  # float32, (groups, a, b): the largest of a kernel as scaled so far

    @property
    def input_axis(self) -> int:
        return 3 - self.output_axis

    def channels(self, axis: int) -> int:
        return self.blocks[0] * self.blocks[axis]

    def ranges(self, axis: int) -> np.ndarray:
        """The largest magnitude of each channel along `axis`, float64."""
        largest: np.ndarray = self.magnitudes.max(axis=3 - axis)
        return largest.reshape(-1).astype(np.float64)

    def scale_magnitudes(self, axis: int, factors: np.ndarray) -> None:
        self.magnitudes *= self._along(axis, factors)[..., 0]

    def scale_weight(self, axis: int, factors: np.ndarray) -> None:
        tensor = self.weight.const_value
        assert tensor is not None
        array = tensor.numpy().reshape(self.blocks) * self._along(axis, factors)
        self.weight.const_value = ir.tensor(array.reshape(tensor.shape.numpy()), name=self.weight.name)

    def _along(self, axis: int, factors: np.ndarray) -> np.ndarray:
        shape = [self.blocks[0], 1, 1, 1]
        shape[axis] = self.blocks[axis]
        return factors.astype(np.float32).reshape(shape)


@dataclass
class _Pair:
    """Two layers; channel i of the first is `repeats` inputs of the second, from i * `repeats` on."""

    first: _Layer
    second: _Layer
    repeats: int
    biases: np.ndarray  # float64, one a channel: magnitudes before any scaling
    scales: np.ndarray = field(init=False)  # float64, one a channel: s of all sweeps together

    def __post_init__(self) -> None:
        self.scales = np.ones_like(self.biases)

    def sweep(self) -> float:
        """Equalize the ranges as the other pairs left them; how far from 1 the scale is that moved most."""
        first, second = self.first, self.second
        made = first.ranges(first.output_axis)
        taken = second.ranges(second.input_axis).reshape(-1, self.repeats).max(axis=1)
        sound = (made > 0) & (taken > 0) & np.isfinite(made) & np.isfinite(taken) & np.isfinite(self.biases)
        biases = self.biases / self.scales
        ranges = np.sqrt(np.multiply(made, taken, out=np.zeros_like(made), where=sound))  # what both will be
        usual = (biases > 0) & (ranges > ranges.max() / 10)  # without the dead channels, which may be the most
        if usual.any():
            made = np.maximum(made, biases / (DOMINANCE * np.median(biases[usual] / made[usual])))
        step = np.sqrt(np.divide(made, taken, out=np.ones_like(made), where=sound))
        scales = np.clip(self.scales * step, SMALLEST, LARGEST)
        step = scales / self.scales
        self.scales = scales
        first.scale_magnitudes(first.output_axis, 1 / step)
        second.scale_magnitudes(second.input_axis, np.repeat(step, self.repeats))
        return float(np.abs(step - 1).max())

    def apply(self, graph: ir.Graph) -> None:
        """Write the scales into the weights and the bias."""
        self.first.scale_weight(self.first.output_axis, 1 / self.scales)
        self.second.scale_weight(self.second.input_axis, np.repeat(self.scales, self.repeats))
        bias = _bias(self.first.node)
        if bias is None:
            return
        assert bias.const_value is not None
        array = bias.const_value.numpy() / self.scales.astype(np.float32)
        if len(bias.uses()) == 1 and not bias.is_graph_output():
            bias.const_value = ir.tensor(array, name=bias.name)
            return
        # Exporters store equal biases once, zeros above all.
        taken = {value.name for node in graph.all_nodes() for value in node.outputs} | set(graph.initializers)
        tensor = ir.tensor(array, name=unused(f"{bias.name}_equalized", taken | {value.name for value in graph.inputs}))
        own = ir.Value(name=tensor.name, shape=bias.shape, type=bias.type, const_value=tensor)
        graph.register_initializer(own)
        self.first.node.replace_input_with(2, own)


def _find_pairs(graph: ir.Graph) -> list[_Pair]:
    layers = {node: layer for node in graph if (layer := _as_layer(node)) is not None}
    pairs = []
    for first in layers.values():
        channels = first.channels(first.output_axis)
        node, inputs = _follow(first.node.outputs[0], channels)
        second = layers.get(node) if node is not None else None
        biases = _bias_magnitudes(first.node, channels)
        if second is not None and second.channels(second.input_axis) == inputs and biases is not None:
            pairs.append(_Pair(first, second, inputs // channels, biases))
    return pairs


def _as_layer(node: ir.Node) -> _Layer | None:
    """`node` as a layer, if it is one whose weight is its own to change."""
    if node.op_type not in _LAYERS or node.domain not in STANDARD or node.attributes.get_int("transA", 0) > 0:
        return None
    weight = node.inputs[1]
    array = _constant(weight)
    if weight is None or array is None or len(weight.uses()) != 1 or weight.is_graph_output():
        return None
    groups = node.attributes.get_int("group", 1)
    if array.size == 0 or array.shape[0] % groups:
        return None
    blocks = (groups, array.shape[0] // groups, array.shape[1], array[0, 0].size)
    kernels = array.reshape(blocks)
    outputs_first = node.op_type == "Conv" or node.attributes.get_int("transB", 0) > 0
    return _Layer(node, weight, blocks, 1 if outputs_first else 2, np.maximum(kernels.max(axis=3), -kernels.min(axis=3)))


def _follow(value: ir.Value, channels: int) -> tuple[ir.Node | None, int]:
    """The layer at the end of the path that scales of the channels (axis 1) can take from `value`, or None; and how many
    inputs it has if each channel is a block of them."""
    inputs, flat = channels, False
    while len(value.uses()) == 1 and not value.is_graph_output():
        ((node, index),) = value.uses()
        if index != 0 or node.domain not in STANDARD:
            break
        if node.op_type in _LAYERS:
            return (node, inputs) if node.op_type == "Gemm" or not flat else (None, 0)
        if node.op_type in ("Flatten", "Reshape") and not flat:
            # Whatever it is made into: where a Gemm takes as many numbers as a sample has here, its rows are the samples.
            sizes = [dim for dim in value.shape.dims[1:] if isinstance(dim, int)] if value.shape is not None else []
            if value.shape is None or len(sizes) + 1 != len(value.shape):
                break
            inputs, flat = math.prod(sizes), True
        elif node.op_type not in _ELEMENTWISE and (flat or not _keeps_channels(node)):
            break
        value = node.outputs[0]
    return None, 0


def _keeps_channels(node: ir.Node) -> bool:
    """Whether `node` pools, or reduces over or drops axes behind that of the channels."""
    if node.op_type not in _OVER_AXES:
        return node.op_type in _POOLING
    value, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or value.shape is None or axes is None or axes.const_value is None:
        return False
    rank = len(value.shape)
    array = axes.const_value.numpy()
    return array.size > 0 and all(axis % rank >= 2 for axis in array.tolist())


def _bias_magnitudes(node: ir.Node, channels: int) -> np.ndarray | None:
    """Of the bias of each channel, float64; None where it is not a constant with a number a channel."""
    if (bias := _bias(node)) is None:
        return np.zeros(channels)
    array = _constant(bias)
    if array is None or not array.size == channels == array.shape[-1]:
        return None
    return np.abs(array.reshape(-1).astype(np.float64))


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a float32 initializer; None for all else."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.dtype != ir.DataType.FLOAT:
        return None
    return None if value.const_value is None else value.const_value.numpy()
