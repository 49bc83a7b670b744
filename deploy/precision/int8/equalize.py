"""The pass that equalizes ranges across layers: it rescales the channels between two layers, so that each channel has the
same range in both weights.

Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV
2019, arXiv:1906.04721, section 4.1. It preserves channels of small range when a whole tensor shares one scale. The
scaling commutes with every f for which f(s x) = s f(x) with s > 0: ReLU and pooling, but never ReLU6.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from deploy.precision.graph import STANDARD, unused
from deploy.precision.int8.folding import FOLDED
from deploy.precision.int8.options import QuantizeOptions
from deploy.precision.passes import PREPARED, VALID, PrecisionPass

SWEEPS = 40
"""The largest number of sweeps over all pairs."""

TOLERANCE = 1e-3
"""A sweep in which no scale differs from 1 by more is the last. A pair whose total scales differ by no more is not changed."""

SMALLEST, LARGEST = 2.0**-16, 2.0**16
"""The bounds of a channel's scale over all sweeps."""

DOMINANCE = 4.0
"""A bias counts as a range if, relative to its channel's weights, it exceeds the layer's median by more than this factor.

A dead channel gives a constant, its bias, from weights that are nearly zero. If its range were that of the weights alone,
equalization would enlarge the constant, and with it the range of the activations, in which all other channels would vanish.
"""

OUTLIER = 8.0
"""A channel is an outlier if its scale and the median of its pair's are further apart than by this factor: of the steps of a shared scale, a channel that
is usual next to it has less than an eighth. The nets of Fashion-MNIST (benchmarks/train_fashion.py) have up to 4."""

LIVE = 0.1
"""Outliers are looked for among the channels whose range, once equalized, is at least this share of the upper quartile: others carry nothing."""

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_ELEMENTWISE = ("Relu", "LeakyRelu", "PRelu", "Dropout", "Identity")
_POOLING = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")
_OVER_AXES = ("ReduceMean", "ReduceMax", "Squeeze")


class Equalize(PrecisionPass):
    """Equalize all pairs of Conv, ConvTranspose and Gemm; the outputs of the graph stay the same.

    A pair is connected by a single path of Relu, LeakyRelu, PRelu, Dropout, Identity, pooling and reductions over axes other
    than the channel axis; before a Gemm, also Flatten and Reshape that keep a channel's elements together. Every tensor on
    the path has one consumer and is not a graph output. The weights are float32 initializers that no other node uses, and
    the bias of the first layer is an initializer with one number for each channel.

    Channel i of the first layer is divided by s_i, and multiplied by it in the second, with s_i = sqrt(r1_i r2_i) / r2_i
    (equation 11), where r is the largest magnitude of the channel's weights. Not from the paper: r1_i is at least
    |bias_i| / (DOMINANCE m), where m is the median of |bias| / r1 over the channels of the layer that are not dead.

    The sweeps over the pairs end when no scale of a sweep differs from 1 by more than TOLERANCE, and after SWEEPS at the
    latest. A channel is not changed if its weights are all zero in either layer, or have NaN or an infinity. s_i stays
    between SMALLEST and LARGEST.

    outliers: equalize only the pairs that have an OUTLIER among their channels.
    layers: after the call, the names of the changed layers in the order of the graph; empty if nothing was equalized.
    """

    needs = (*PREPARED, FOLDED)
    leaves = (*PREPARED, VALID)

    def __init__(self, *, outliers: bool = False) -> None:
        self.layers: tuple[str, ...] = ()
        self._outliers = outliers

    def call(self, model: ir.Model) -> PassResult:
        pairs = [pair for pair in _find_pairs(model.graph) if not self._outliers or pair.spread() > OUTLIER]
        for _ in range(SWEEPS):
            if max((pair.sweep() for pair in pairs), default=0.0) < TOLERANCE:
                break
        changed: set[ir.Node] = set()
        for pair in pairs:
            if np.abs(pair.scales - 1).max() > TOLERANCE:
                pair.apply(model.graph)
                changed |= {pair.first.node, pair.second.node}
        self.layers = tuple(node.name or "" for node in model.graph if node in changed)
        return PassResult(model, bool(changed))


def equalize(model: ir.Model, options: QuantizeOptions) -> tuple[str, ...]:
    """As the options say, equalize all pairs of layers, those with outliers, or none; returns the names of the changed layers."""
    # The steps of FP8 are as fine, relative to a number, for small ones as for large ones.
    if options.equalize is False or (options.equalize is None and options.fp8):
        return ()
    depthwise = any(node.op_type == "Conv" and node.attributes.get_int("group", 1) > 1 for node in model.graph)
    equalizing = Equalize(outliers=not (options.equalize or options.per_tensor or depthwise))
    equalizing(model)
    return equalizing.layers


@dataclass
class _Layer:
    """A layer with its weight viewed as (groups, a, b, kernel): a is the output channels of a group and b its inputs, or the reverse."""

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
    """Two layers. Channel i of the first feeds `repeats` inputs of the second, starting at i * `repeats`."""

    first: _Layer
    second: _Layer
    repeats: int
    biases: np.ndarray  # float64, one for each channel: magnitudes before any scaling
    scales: np.ndarray = field(init=False)  # float64, one for each channel: the product of s over all sweeps

    def __post_init__(self) -> None:
        self.scales = np.ones_like(self.biases)

    def spread(self) -> float:
        """By what factor the channel furthest off the median scale of those that are LIVE is off it; 1 or more."""
        made, taken, sound = self._ranges()
        if not sound.any():
            return 1.0
        ranges, steps = np.sqrt(made[sound] * taken[sound]), np.sqrt(made[sound] / taken[sound])
        steps = np.log(steps[ranges >= LIVE * np.quantile(ranges, 0.75)])
        return float(np.exp(np.abs(steps - np.median(steps)).max()))

    def sweep(self) -> float:
        """Equalize the current ranges; returns how far the scale that moved most is from 1."""
        first, second = self.first, self.second
        made, taken, sound = self._ranges()
        biases = self.biases / self.scales
        ranges = np.sqrt(np.multiply(made, taken, out=np.zeros_like(made), where=sound))  # the range of both afterwards
        usual = (biases > 0) & (ranges > ranges.max() / 10)  # without the dead channels, which may be the majority
        if usual.any():
            made = np.maximum(made, biases / (DOMINANCE * np.median(biases[usual] / made[usual])))
        step = np.sqrt(np.divide(made, taken, out=np.ones_like(made), where=sound))
        scales = np.clip(self.scales * step, SMALLEST, LARGEST)
        step = scales / self.scales
        self.scales = scales
        first.scale_magnitudes(first.output_axis, 1 / step)
        second.scale_magnitudes(second.input_axis, np.repeat(step, self.repeats))
        return float(np.abs(step - 1).max())

    def _ranges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each channel the range of its weights in the first layer and in the second, and whether both are finite and more than 0."""
        made = self.first.ranges(self.first.output_axis)
        taken = self.second.ranges(self.second.input_axis).reshape(-1, self.repeats).max(axis=1)
        sound = (made > 0) & (taken > 0) & np.isfinite(made) & np.isfinite(taken) & np.isfinite(self.biases)
        return made, taken, sound

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
    """`node` as a layer; None unless it is a layer with a weight that nothing else uses."""
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
    """The layer to which `value` passes the scales of its channels (axis 1), and the number of inputs that this layer has if
    each channel is a block of them; (None, 0) if there is no such layer."""
    inputs, flat = channels, False
    while len(value.uses()) == 1 and not value.is_graph_output():
        ((node, index),) = value.uses()
        if index != 0 or node.domain not in STANDARD:
            break
        if node.op_type in _LAYERS:
            return (node, inputs) if node.op_type == "Gemm" or not flat else (None, 0)
        if node.op_type in ("Flatten", "Reshape") and not flat:
            # The new shape does not matter: if a Gemm takes as many numbers as a sample has here, its rows are the samples.
            sizes = [dim for dim in value.shape.dims[1:] if isinstance(dim, int)] if value.shape is not None else []
            if value.shape is None or len(sizes) + 1 != len(value.shape):
                break
            inputs, flat = math.prod(sizes), True
        elif node.op_type not in _ELEMENTWISE and (flat or not _keeps_channels(node)):
            break
        value = node.outputs[0]
    return None, 0


def _keeps_channels(node: ir.Node) -> bool:
    """Whether `node` is a pooling, or reduces or drops only axes after the channel axis."""
    if node.op_type not in _OVER_AXES:
        return node.op_type in _POOLING
    value, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or value.shape is None or axes is None or axes.const_value is None:
        return False
    rank = len(value.shape)
    array = axes.const_value.numpy()
    return array.size > 0 and all(axis % rank >= 2 for axis in array.tolist())


def _bias_magnitudes(node: ir.Node, channels: int) -> np.ndarray | None:
    """The magnitude of each channel's bias, float64; None unless the bias is a constant with one number for each channel."""
    if (bias := _bias(node)) is None:
        return np.zeros(channels)
    array = _constant(bias)
    if array is None or not array.size == channels == array.shape[-1]:
        return None
    return np.abs(array.reshape(-1).astype(np.float64))


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a float32 initializer; None for any other value."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.dtype != ir.DataType.FLOAT:
        return None
    return None if value.const_value is None else value.const_value.numpy()
