"""Which activations are smoothed, and by what: see `deploy.precision.int8.smooth`.

For x with channels of very different ranges, one scale wastes most of its levels on most of them. Every candidate is tried on
vectors that its ranges were not taken from, with weights as codes, and the one whose layers lose least is kept, if it is better by
enough.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir

from deploy.artifact.tensors import Feed
from deploy.calibration.histogram import Histogram
from deploy.calibration.thresholds import threshold
from deploy.precision.codes import Codes
from deploy.precision.cpu import STREAMS
from deploy.precision.graph import STANDARD
from deploy.precision.int8.absorb import absorber_of
from deploy.precision.int8.histograms import Activations
from deploy.precision.int8.placement import PASS_THROUGH, Placement
from deploy.precision.int8.smooth import Channels, is_pointwise, matrix_of

ROWS = 64
"""Rows of data that are looked at."""

ALPHAS = (0.5, 0.65, 0.8, 0.9)
"""How much of a channel's range goes from the activation to the weight: scale = range^alpha / weight^(1 - alpha), equation 4 of
SmoothQuant. It has 0.5; where a shift has centred the channels first, more is better (docs/int8.md)."""

GAIN_FREE, GAIN = 0.5, 2.0
"""Decibels that the layers must gain, where what makes the activation absorbs the parameters, and where nodes must be added."""

_EVERY, _FEWEST = 4, 4
"""One vector in this many judges, the others give the ranges; where fewer than this judge, nothing is smoothed."""

_POSITIONS = 256
"""Vectors of a tensor that judge. Their number bounds time and memory."""

_LARGEST = 2.0**8
"""How far a channel's scale may be from the geometric mean."""

_PLAIN = ("AveragePool", "Clip", "Conv", "ConvTranspose", "GlobalAveragePool", "LeakyRelu", "MaxPool", "PRelu", "ReduceMean", "Relu")  # fmt: skip
"""Operators whose channels are left alone: runtimes compute them together with the rounding that follows."""

_CURVED = ("Celu", "Elu", "Gelu", "HardSwish", "Mish", "Mul", "Swish")
"""Operators before a convolution whose channels are evened out: activations with little below zero, and products, which the gates
of squeeze-and-excitation end in. They are pointwise, as what is added is, and engines compute both at once."""

_MATRIX = 2


def choose_channels(
    model: ir.Model,
    placement: Placement,
    rows: Iterable[Feed],
    codes: Codes,
    *,
    per_tensor: bool,
    corrected: bool,
    maps: bool = True,
) -> dict[str, Channels]:
    """What is worth smoothing, by tensor of `placement.edges`.

    model: prepared, FP32, of one scope (`deploy.precision.int8.branches`). rows: each is one row of data, or more where it cannot be
    divided. per_tensor: of weights. corrected: the mean error will be taken off. maps: look at what convolutions read too. A tensor in a branch of If is judged on the rows
    that ran it. Raises PrecisionError.
    """
    readers = {name: layers for name, layers in _candidates(model, placement).items() if maps or layers[0].op_type != "Conv"}
    if not readers:
        return {}
    activations = Activations(model, list(readers))
    seen = {name: _Seen(maps=layers[0].op_type == "Conv") for name, layers in readers.items()}
    for row in rows:
        tensors, _ = activations(row)
        for name, array in tensors.items():
            seen[name].add(array)
    del activations
    made = (value for node in model.graph.all_nodes() for value in node.outputs)
    values = {value.name: value for value in (*model.graph.inputs, *made)}

    def best(name: str) -> Channels | None:
        value, layers = values[name], readers[name]
        if len(seen[name].judging) < _FEWEST:
            return None
        absorber = absorber_of(value, layers, placement)
        trial = _Trial(layers, seen[name], codes, per_tensor=per_tensor, corrected=corrected)
        return trial.best(
            GAIN if absorber is None else GAIN_FREE,
            shifts=absorber is None or absorber.shifts,
            scales=not seen[name].maps and not (per_tensor and absorber is not None and absorber.in_weight),
        )

    with ThreadPoolExecutor(STREAMS, thread_name_prefix="channels") as pool:
        found = dict(zip(readers, pool.map(best, readers), strict=True))
    return {name: channels for name, channels in found.items() if channels is not None}


def _candidates(model: ir.Model, placement: Placement) -> dict[str, list[ir.Node]]:
    """Tensors whose channels can be evened out, and the layers that read them quantized: no others do.

    Either all of these have a matrix, or all are convolutions of 1x1 without padding behind an activation or a product.
    """
    nodes = {node.name or "": node for node in model.graph.all_nodes()}
    makers = {value.name: node for node in nodes.values() for value in node.outputs}

    def reads_channels(name: str, index: int) -> bool:
        node = nodes[name]
        weight = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if index or name not in placement.weights or weight is None:
            return False
        return is_pointwise(node) if node.op_type == "Conv" else len(weight.shape) == _MATRIX

    def maker_of(name: str) -> ir.Node | None:
        maker = makers.get(name)
        while maker is not None and maker.op_type in PASS_THROUGH and maker.inputs[0] is not None:
            maker = maker.inputs[0].producer()
        return maker if maker is not None and maker.domain in STANDARD else None

    found = {}
    for tensor, uses in placement.edges.items():
        layers = [nodes[name] for name, _ in uses]
        operators = {node.op_type for node in layers}
        maker = maker_of(tensor)
        wanted = maker is None or maker.op_type not in _PLAIN
        if operators == {"Conv"}:
            wanted = makers.get(tensor) is maker is not None and maker.op_type in _CURVED
        elif not operators <= {"Gemm", "MatMul"}:
            wanted = False
        if wanted and all(reads_channels(name, index) for name, index in uses):
            found[tensor] = layers
    return found


class _Seen:
    """The range of every channel of a tensor, low and high, and vectors that the ranges are not from.

    maps: the channels are the second axis, and one range of all is looked for: without the few numbers that calibration cuts off.
    """

    def __init__(self, *, maps: bool) -> None:
        self.maps = maps
        self._count = 0
        self._judging: list[np.ndarray] = []
        self._magnitudes = Histogram()
        self.low: np.ndarray = np.zeros(0, np.float32)
        self.high: np.ndarray = np.zeros(0, np.float32)

    def add(self, array: np.ndarray) -> None:
        vectors = (np.moveaxis(array, 1, -1) if self.maps else array).reshape(-1, array.shape[1 if self.maps else -1])
        judges = np.arange(self._count, self._count + len(vectors)) % _EVERY == _EVERY - 1
        self._count += len(vectors)
        if judges.any():
            some = vectors[judges]
            self._judging.append(some[:: math.ceil(len(some) * ROWS / _POSITIONS)].copy())
        if not judges.all():
            low, high = vectors[~judges].min(axis=0), vectors[~judges].max(axis=0)
            if self.maps and np.isfinite([low, high]).all():
                self._magnitudes.add(vectors[~judges])
            first = not self.low.size
            self.low = low if first else np.minimum(self.low, low)
            self.high = high if first else np.maximum(self.high, high)

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest number of each channel."""
        if not self.maps:
            return self.low, self.high
        largest = threshold(self._magnitudes, "percentile")
        return np.maximum(self.low, -largest), np.minimum(self.high, largest)

    @property
    def judging(self) -> np.ndarray:
        return np.concatenate(self._judging) if self._judging else np.zeros((0, self.low.size), np.float32)


class _Trial:
    """The layers that read one tensor, and what they lose to each candidate."""

    def __init__(self, layers: Sequence[ir.Node], seen: _Seen, codes: Codes, *, per_tensor: bool, corrected: bool) -> None:
        self._codes = codes
        self._per_tensor = per_tensor
        self._corrected = corrected
        self._maps = seen.maps
        self._low, self._high = seen.ranges()
        self._vectors = seen.judging
        self._matrices = [matrix_of(node).astype(np.float32, copy=False) for node in layers]
        self._wanted = [self._vectors @ matrix for matrix in self._matrices]
        self._energies = [np.square(each, dtype=np.float64).sum(axis=1) for each in self._wanted]

    def best(self, gain_db: float, *, shifts: bool, scales: bool) -> Channels | None:
        """The candidate with the least error, if that is below the present one by `gain_db`. shifts, scales: whether to try them."""
        size = self._low.size
        live = all(energy.any() for energy in self._energies)
        if size < _MATRIX or not live or not np.isfinite([self._low, self._high]).all():
            return None
        zero = np.zeros(size, np.float32)
        now = self._error(Channels(shift=zero, scale=zero + 1))
        shift = (self._low + self._high) / 2 if shifts else zero
        if self._maps:
            shift = zero + (self._low.min() + self._high.max()) / 2
        errors = [(self._error(each), index, each) for index, each in enumerate(self._candidates(shift, scales=scales))]
        least, _, channels = min(errors, key=lambda item: item[:2])
        return channels if least * 10 ** (gain_db / 10) < now else None

    def _candidates(self, shift: np.ndarray, *, scales: bool) -> Iterator[Channels]:
        yield Channels(shift=shift, scale=np.ones_like(shift))
        weights = np.max([np.abs(matrix).max(axis=1) for matrix in self._matrices], axis=0).astype(np.float64)
        ranges = np.maximum(self._high - shift, shift - self._low).astype(np.float64)
        live = (ranges > 0) & (weights > 0)
        if not scales or not live.any():
            return
        for alpha in ALPHAS:
            logs = alpha * np.log(ranges, where=live, out=np.zeros_like(ranges))
            logs -= (1 - alpha) * np.log(weights, where=live, out=np.zeros_like(weights))
            logs = np.where(live, logs - logs[live].mean(), 0)
            yield Channels(shift=shift, scale=np.clip(np.exp(logs), 1 / _LARGEST, _LARGEST).astype(np.float32))

    def _error(self, channels: Channels) -> float:
        """The energy of the error of the outputs relative to their own, each vector counting alike.

        A norm behind makes all vectors alike, and some of a transformer have a thousand times the energy of the others.
        """
        exact = self._vectors - channels.shift
        amax = float((np.maximum(self._high - channels.shift, channels.shift - self._low) / channels.scale).max())
        rounded = self._codes.read_back(exact / channels.scale, self._codes.scale_of(amax))
        total = 0.0
        for matrix, wanted, energy in zip(self._matrices, self._wanted, self._energies, strict=True):
            codes, scale = self._codes.quantize_weight(matrix * channels.scale[:, None], None if self._per_tensor else 1)
            off = rounded @ (codes.astype(np.float32) * scale) - (wanted - channels.shift @ matrix)
            if self._corrected:
                off -= off.mean(axis=0)
            usual = np.median(energy[energy > 0])  # padding makes vectors of zeros
            total += float((np.square(off, dtype=np.float64).sum(axis=1) / (energy + usual)).mean())
        return total
