"""How much every quantized node is off on the inputs it has in FP32: its mean error by channel, and its noise.

Each node is judged by itself: `y = f(x)` of the FP32 graph against `f` with INT8 weights on the same `x` in INT8. So one
bad layer does not spoil the figures of those behind it, and correcting one does not upset the others.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.precision.cpu import STREAMS, CpuGraph
from deploy.precision.int8.placement import Placement, Weight
from deploy.precision.int8.rewrite import quantize_weight

NOISE_ROWS = 4
"""Rows of data that the noise is measured on: every position of an image is a sample, so that few are enough."""

_CORRECTED = ("Conv", "ConvTranspose", "Gemm")
"""Operators with a bias that can take the correction; they are linear in their input."""

_CHANNEL_AXIS = 1
_RANGE = (-128, 127)

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The error of one node.

    mean: float32 (channels,), the mean of exact minus quantized outputs by output channel; added to the bias it takes
        the systematic error away (Nagel et al. 2019, arXiv:1906.04721, section 4.2, with the mean measured and not
        derived). None for an operator without a bias.
    sqnr_db: signal-to-quantization-noise ratio of the output in dB, 10 log10(sum y^2 / sum error^2), once the mean
        error is taken away. Infinite without any error.
    sqnr_uncorrected_db: the same with the mean error left in.
    """

    mean: np.ndarray | None
    sqnr_db: float
    sqnr_uncorrected_db: float


class Audit:
    """Takes the tensors that a graph has on data, and tells the error of every quantized node.

    A layer is linear, so the mean of its outputs over rows is its output on the mean row: the mean error costs two runs
    of the layer in all, however many rows there are.
    """

    def __init__(self, model: onnx.ModelProto, placement: Placement, scales: Mapping[str, float], *, per_tensor: bool) -> None:
        self._scales = scales
        taken: dict[str, dict[int, str]] = {name: {} for name in placement.nodes}
        for tensor, uses in placement.edges.items():
            for node, index in uses:
                if node in taken:
                    taken[node][index] = tensor
        weights = {
            name: dataclasses.replace(weight, axis=None) if per_tensor else weight for name, weight in placement.weights.items()
        }
        nodes = {node.name: node for node in model.graph.node}
        self._probes = [_Probe(model, nodes[name], found, weights.get(name)) for name, found in taken.items()]
        self._tensors = tuple(dict.fromkeys(tensor for probe in self._probes for tensor in probe.tensors))
        self._means: dict[tuple[tuple[int, ...], ...], dict[str, _Mean]] = {}
        self._noise: list[dict[str, np.ndarray]] = []
        self._rows = 0

    def add(self, tensors: Arrays, rows: int) -> None:
        """Take the tensors of `placement.edges` on a feed of `rows` rows."""
        exact = {name: tensors[name] for name in self._tensors}
        shapes = tuple(array.shape[1:] for array in exact.values())  # images may be of many sizes
        means = self._means.setdefault(shapes, {name: _Mean() for name in exact})
        for name, array in exact.items():
            means[name].add(array, self._rounded(name, array))
        if self._rows < NOISE_ROWS:
            share = min(1.0, (NOISE_ROWS - self._rows) / rows)  # a tensor may have several rows for one of the feed
            self._noise.append({name: array[: math.ceil(len(array) * share)].copy() for name, array in exact.items()})
        self._rows += rows

    def finish(self) -> dict[str, LayerError]:
        """The error of every quantized Conv, ConvTranspose, Gemm and MatMul, by name. Raises PrecisionError."""
        with ThreadPoolExecutor(STREAMS, thread_name_prefix="audit") as pool:
            return dict(zip((probe.name for probe in self._probes), pool.map(self._error, self._probes), strict=True))

    def _error(self, probe: "_Probe") -> LayerError:
        run = CpuGraph(probe.build(), streams=STREAMS)
        constants = probe.constants()
        mean, noise = _Sums(), _Sums()
        for means in self._means.values():
            rows = means[probe.tensors[0]].rows
            pairs = [(means[name].exact, means[name].rounded) for name in probe.tensors]
            mean.add(run(constants | probe.feed(pairs)), rows)
        for exact in self._noise:
            pairs = [(exact[name], self._rounded(name, exact[name])) for name in probe.tensors]
            noise.add(run(constants | probe.feed(pairs)))
        return _error(mean.totals, noise.totals)

    def _rounded(self, name: str, exact: np.ndarray) -> np.ndarray:
        """`exact` as its INT8 form is read back."""
        scale = np.float32(self._scales[name])
        codes: np.ndarray = np.divide(exact, scale)
        np.rint(codes, out=codes)
        np.clip(codes, *_RANGE, out=codes)
        codes *= scale
        return codes


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

    def add(self, found: Arrays, weight: int = 1) -> None:
        for part, value in found.items():
            self.totals[part] = self.totals.get(part, np.float64(0)) + np.asarray(value, dtype=np.float64) * weight


class _Probe:
    """A graph of one quantized node alone, on its exact and on its rounded input, and of sums of the difference.

    The weights are inputs of the graph: as initializers they would be copied and laid out anew for two runs.

    tensors: the activations that the node takes, the first input first.
    """

    def __init__(self, model: onnx.ModelProto, node: onnx.NodeProto, taken: Mapping[int, str], stored: Weight | None) -> None:
        self.name = node.name
        self.tensors = tuple(taken[index] for index in sorted(taken))
        self._model = model
        self._node = node
        self._taken = sorted(taken)
        self._stored = stored
        known = {tensor.name: tensor for tensor in model.graph.initializer}
        self._known = {index: known[name] for index, name in enumerate(node.input) if name and index not in self._taken}

    def feed(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """The activations, of the exact and the rounded array of each tensor."""
        return {
            f"{sort}{index}": np.ascontiguousarray(pair[which])
            for index, pair in zip(self._taken, pairs, strict=True)
            for which, sort in enumerate(("exact", "rounded"))
        }

    def constants(self) -> dict[str, np.ndarray]:
        """The weights and the bias, and the weights as they are read back."""
        found = {f"constant{index}": numpy_helper.to_array(tensor) for index, tensor in self._known.items()}
        if self._stored is not None:
            found["weight"] = _read_back(found["constant1"], self._stored.axis)
        return found

    def build(self) -> onnx.ModelProto:
        node = self._node
        exact, rounded = (self._twin(sort) for sort in ("exact", "rounded"))
        nodes = [exact, rounded, helper.make_node("Sub", ["exact", "rounded"], ["error"])]
        nodes.append(helper.make_node("ReduceSumSquare", ["error"], ["noise"], keepdims=0))
        nodes.append(helper.make_node("ReduceSumSquare", ["exact"], ["signal"], keepdims=0))
        nodes.append(helper.make_node("Size", ["error"], ["size"]))
        inputs = {f"{sort}{index}": TensorProto.FLOAT for index in self._taken for sort in ("exact", "rounded")}
        inputs |= {f"constant{index}": tensor.data_type for index, tensor in self._known.items()}
        outputs = {"noise": TensorProto.FLOAT, "signal": TensorProto.FLOAT, "size": TensorProto.INT64}
        axes = []
        if self._stored is not None:
            inputs["weight"] = TensorProto.FLOAT
            rounded.input[1] = "weight"
            if node.op_type in _CORRECTED:
                others = [axis for axis in range(len(self._known[1].dims)) if axis != _CHANNEL_AXIS]
                axes.append(numpy_helper.from_array(np.array(others, dtype=np.int64), "axes"))
                nodes.append(helper.make_node("ReduceSum", ["error", "axes"], ["sum"], keepdims=0))
                outputs["sum"] = TensorProto.FLOAT
        graph = helper.make_graph(nodes, "probe", _values(inputs), _values(outputs), axes)
        return helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)

    def _twin(self, sort: str) -> onnx.NodeProto:
        """The node on inputs and constants of the graph."""
        twin = onnx.NodeProto()
        twin.CopyFrom(self._node)
        twin.name = sort
        for index, name in enumerate(twin.input):
            if name:
                twin.input[index] = f"{sort}{index}" if index in self._taken else f"constant{index}"
        twin.ClearField("output")
        twin.output.append(sort)
        return twin


def _values(dtypes: Mapping[str, int]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, dtype, None) for name, dtype in dtypes.items()]


def _read_back(weight: np.ndarray, axis: int | None) -> np.ndarray:
    """A weight as its INT8 form is read back."""
    codes, scale = quantize_weight(weight, axis)
    along = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
    return np.asarray(codes.astype(np.float32) * (scale if axis is None else scale.reshape(along)))


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
