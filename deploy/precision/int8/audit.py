"""The error of every quantized node on its FP32 inputs: its mean by channel, and its noise.

A node is judged alone: `y = f(x)` of the FP32 graph is compared with `f` with quantized weights on the same `x`, quantized. So one
bad layer does not affect the figures of the layers after it, and correcting one layer does not disturb the others.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploy.precision.codes import Codes
from deploy.precision.cpu import STREAMS, CpuGraph
from deploy.precision.int8.placement import Placement, Weight

NOISE_ROWS = 4
"""Rows of data that the noise is measured on. A few are enough, because every position of an image is a sample."""

_CORRECTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose bias can be corrected; they are linear in their input. That of a MatMul is added behind it."""

_SUM = "Add"
_CHANNEL_AXIS = 1
_BIAS = 2
_MATRIX = 2

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The error of one node.

    mean: float32 (channels,), the mean of exact minus quantized outputs by output channel; adding it to the bias removes
        the systematic error (Nagel et al. 2019, arXiv:1906.04721, section 4.2, except that the mean is measured and not
        derived). None for an operator without a bias.
    sqnr_db: signal-to-quantization-noise ratio of the output in dB, 10 log10(sum y^2 / sum error^2), without
        the mean error. Infinite if there is no error.
    sqnr_uncorrected_db: the same with the mean error included.
    """

    mean: np.ndarray | None
    sqnr_db: float
    sqnr_uncorrected_db: float


class Audit:
    """Collects the tensors of a prepared model on data, and computes the error of every quantized node.

    A layer is linear, so the mean of its outputs over rows is its output on the mean row: the mean error takes two runs
    of the layer in total, regardless of the number of rows.
    """

    def __init__(
        self,
        model: ir.Model,
        placement: Placement,
        scales: Mapping[str, float],
        *,
        joint: Mapping[str, float] | None = None,
        codes: Codes,
        per_tensor: bool,
    ) -> None:
        self._codes = codes
        self._scales = scales
        self._joint = dict(scales) | dict(joint or {})
        self._joints = placement.joints
        taken: dict[str, dict[int, str]] = {}
        for tensor, uses in placement.edges.items():
            for node, index in uses:
                taken.setdefault(node, {})[index] = tensor
        weights = {
            name: dataclasses.replace(weight, axis=None) if per_tensor else weight for name, weight in placement.weights.items()
        }
        nodes = {node.name: node for node in model.graph.all_nodes()}
        self._probes = [_Probe(model, nodes[name], tensors, weights.get(name), codes) for name, tensors in taken.items()]
        self._tensors = tuple(dict.fromkeys(tensor for probe in self._probes for tensor in probe.tensors))
        linear = [tensor for probe in self._probes if probe.has_weight for tensor in probe.tensors]
        self._averaged = tuple(dict.fromkeys(linear))
        self._matrices = {tensor for probe in self._probes if not probe.has_weight for tensor in probe.tensors}
        self._means: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, _Mean]] = {}
        self._noise: list[dict[str, np.ndarray]] = []
        self._rows: Counter[frozenset[str]] = Counter()  # by the tensors that are there: those of one branch of each If

    def add(self, tensors: Arrays, rows: int) -> None:
        """Add the tensors of `placement.edges` on a feed of `rows` rows, without those of branches that it did not run."""
        exact = {name: tensors[name] for name in self._tensors if name in tensors}
        averaged = [name for name in self._averaged if name in exact]
        shapes = tuple((name, exact[name].shape[1:]) for name in averaged)  # images may have different sizes
        means = self._means.setdefault(shapes, {name: _Mean() for name in averaged})
        for name, mean in means.items():
            mean.add(exact[name], self._codes.read_back(exact[name], self._scales[name]))
        there = frozenset(exact)
        if self._rows[there] < NOISE_ROWS:
            share = min(1.0, (NOISE_ROWS - self._rows[there]) / rows)  # a tensor may have several rows for one row of the feed
            self._noise.append({name: self._part(name, array, share).copy() for name, array in exact.items()})
        self._rows[there] += rows

    def _part(self, name: str, array: np.ndarray, share: float) -> np.ndarray:
        """The first rows of a tensor; a matrix that is multiplied by another has no rows of its own."""
        return array if array.ndim == _MATRIX and name in self._matrices else array[: math.ceil(len(array) * share)]

    def finish(self) -> dict[str, LayerError]:
        """The error of every node that reads a quantized tensor and that a feed ran, by name. Raises PrecisionError."""
        ran = {probe.name: probe for probe in self._probes if any(probe.is_in(exact) for exact in self._noise)}
        with ThreadPoolExecutor(STREAMS, thread_name_prefix="audit") as pool:
            return dict(zip(ran, pool.map(self._error, ran.values()), strict=True))

    def _error(self, probe: "_Probe") -> LayerError:
        runs = [exact for exact in self._noise if probe.is_in(exact)]
        run = CpuGraph(probe.build(runs[0][probe.tensors[0]].ndim), streams=STREAMS)
        constants = probe.constants()
        mean, noise = _Sums(), _Sums()
        for means in (each for each in self._means.values() if probe.has_weight and probe.is_in(each)):
            rows = means[probe.tensors[0]].rows
            pairs = [(means[name].exact, means[name].rounded) for name in probe.tensors]
            mean.add(run(constants | probe.feed(pairs)), rows)
        scales = self._joint if probe.name in self._joints else self._scales
        for exact in runs:
            pairs = [(exact[name], self._codes.read_back(exact[name], scales[name])) for name in probe.tensors]
            noise.add(run(constants | probe.feed(pairs)))
        return _error(mean.totals, noise.totals)


class _Mean:
    """The mean row of a tensor, exact and rounded: float32, one row."""

    def __init__(self) -> None:
        self.rows = 0
        self._exact: np.ndarray | float = 0.0
        self._rounded: np.ndarray | float = 0.0

    def add(self, exact: np.ndarray, rounded: np.ndarray) -> None:
        self.rows += len(exact)
        self._exact = self._exact + exact.sum(axis=0, keepdims=True, dtype=np.float32)
        self._rounded = self._rounded + rounded.sum(axis=0, keepdims=True, dtype=np.float32)

    @property
    def exact(self) -> np.ndarray:
        return np.asarray(self._exact / np.float32(self.rows), dtype=np.float32)

    @property
    def rounded(self) -> np.ndarray:
        return np.asarray(self._rounded / np.float32(self.rows), dtype=np.float32)


class _Sums:
    """Sums of a probe's outputs over runs, in float64."""

    def __init__(self) -> None:
        self.totals: dict[str, np.ndarray] = {}

    def add(self, outputs: Arrays, weight: int = 1) -> None:
        for part, value in outputs.items():
            self.totals[part] = self.totals.get(part, np.float64(0)) + np.asarray(value, dtype=np.float64) * weight


class _Probe:
    """A model of one quantized node alone, on its exact and its rounded input, with sums of the difference as outputs.

    The weights are inputs of the model: as initializers they would be copied and laid out anew for only two runs. A bias that is
    computed, or differs between the rows of a Gemm, is left out: the difference does not depend on it. Of a residual sum, only what
    it adds is judged: the other operand is exact.

    tensors: the activations that the node takes, in the order of its inputs. has_weight: it is linear in them, with a weight.
    """

    def __init__(self, model: ir.Model, node: ir.Node, taken: Mapping[int, str], stored: Weight | None, codes: Codes) -> None:
        self._codes = codes
        self.name = node.name or ""
        self.tensors = tuple(taken[index] for index in sorted(taken))
        self._opsets = dict(model.opset_imports)
        self._ir_version = model.ir_version
        self._node = node
        self._taken = sorted(taken)
        self._stored = stored
        self.has_weight = stored is not None
        self._known: dict[int, ir.TensorProtocol] = {}
        self._places = self._taken if node.op_type == _SUM else list(range(len(node.inputs)))
        for index in self._places:
            value = node.inputs[index]
            if value is None or index in self._taken:
                continue
            if index == _BIAS and (value.const_value is None or len(value.const_value.shape) > 1):
                continue
            assert value.const_value is not None
            self._known[index] = value.const_value

    def is_in(self, tensors: Collection[str]) -> bool:
        """Whether the activations that the node takes are among `tensors`."""
        return all(name in tensors for name in self.tensors)

    def feed(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """The activations, from the exact and the rounded array of each tensor."""
        return {
            f"{sort}{index}": np.ascontiguousarray(pair[which])
            for index, pair in zip(self._taken, pairs, strict=True)
            for which, sort in enumerate(("exact", "rounded"))
        }

    def constants(self) -> dict[str, np.ndarray]:
        """The weights and the bias, and the weights after quantization and back."""
        arrays = {f"constant{index}": tensor.numpy() for index, tensor in self._known.items()}
        if self._stored is not None:
            arrays["weight"] = _read_back(arrays["constant1"], self._stored.axis, self._codes)
        return arrays

    def build(self, rank: int) -> ir.Model:
        """rank: of the first activation, and of the output."""
        inputs = {f"{sort}{index}": _value(f"{sort}{index}") for index in self._taken for sort in ("exact", "rounded")}
        inputs |= {f"constant{index}": _value(f"constant{index}", tensor.dtype) for index, tensor in self._known.items()}
        if self._stored is not None:
            inputs["weight"] = _value("weight")
        twins = [self._twin(sort, inputs) for sort in ("exact", "rounded")]
        exact, rounded = (twin.outputs[0] for twin in twins)
        subtract = ir.Node("", "Sub", [exact, rounded], outputs=[_value("error")])
        error = subtract.outputs[0]
        whole = [ir.AttrInt64("keepdims", 0)]
        sums = [
            ir.Node("", "ReduceSumSquare", [error], whole, outputs=[_value("noise")]),
            ir.Node("", "ReduceSumSquare", [exact], whole, outputs=[_value("signal")]),
            ir.Node("", "Size", [error], outputs=[_value("size", ir.DataType.INT64)]),
        ]
        axes = []
        stack = self._node.op_type == "MatMul" and self._stored is not None and len(self._known[1].shape) > _MATRIX
        if self._stored is not None and self._node.op_type in _CORRECTED and not stack:
            channel = rank - 1 if self._node.op_type == "MatMul" else _CHANNEL_AXIS
            others = [axis for axis in range(rank) if axis != channel]
            tensor = ir.tensor(np.array(others, dtype=np.int64), name="axes")
            axes.append(
                ir.Value(name="axes", type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
            )
            sums.append(ir.Node("", "ReduceSum", [error, axes[0]], whole, outputs=[_value("sum")]))
        graph = ir.Graph(
            list(inputs.values()),
            [node.outputs[0] for node in sums],
            nodes=[*twins, subtract, *sums],
            initializers=axes,
            opset_imports=self._opsets,
            name="probe",
        )
        return ir.Model(graph, ir_version=self._ir_version)

    def _twin(self, sort: str, inputs: Mapping[str, ir.Value]) -> ir.Node:
        """A copy of the node that takes the inputs of the probe; the rounded one takes the quantized weight."""
        operands = [inputs.get(f"{sort}{index}" if index in self._taken else f"constant{index}") for index in self._places]
        if sort == "rounded" and self._stored is not None:
            operands[1] = inputs["weight"]
        node = self._node
        operator = "Identity" if node.op_type == _SUM else node.op_type
        return ir.Node(node.domain, operator, operands, node.attributes.values(), outputs=[_value(sort)], name=sort)


def _value(name: str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype))


def _read_back(weight: np.ndarray, axis: int | None, codes: Codes) -> np.ndarray:
    """A weight after quantization and back."""
    stored, scale = codes.quantize_weight(weight, axis)
    along = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
    return np.asarray(stored.astype(np.float32) * (scale if axis is None else scale.reshape(along)))


def _error(mean: Mapping[str, np.ndarray], noise: Mapping[str, np.ndarray]) -> LayerError:
    signal, squares = float(noise["signal"]), float(noise["noise"])
    uncorrected = _decibels(signal, squares)
    if "sum" not in mean:
        return LayerError(mean=None, sqnr_db=uncorrected, sqnr_uncorrected_db=uncorrected)
    shift = mean["sum"] / (float(mean["size"]) / mean["sum"].size)
    count = float(noise["size"]) / shift.size
    left = squares - 2 * float(shift @ noise["sum"]) + count * float(shift @ shift)  # sum over all of (error - shift)^2
    return LayerError(mean=shift.astype(np.float32), sqnr_db=_decibels(signal, max(left, 0.0)), sqnr_uncorrected_db=uncorrected)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
