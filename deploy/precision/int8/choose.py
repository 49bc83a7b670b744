"""The method `auto`: for every activation a percentile, or by entropy, unless another range has a clearly lesser error at the output of its readers.

What clipping and rounding cost depends on the weights behind: a range that is best for the numbers themselves (`mse`) may cut
off the few channels that decide. A layer is linear in its input x, so that the error of its output is the layer, without its
bias, on x - q(x): one run of the layer for each candidate.

The least error is not the best range: over the nets of docs/int8.md it loses 20 images of 3,000 of a MobileNet where a percentile loses 2, and with
four times the rows it loses more, for what it keeps is the largest numbers, which are those of the images that are classified with ease. So
the first candidate stands unless another is better by more than that: a percentile before convolutions and Gemm, and entropy before
MatMul, which the linear layers of transformers are, where it is the best of all methods for MiniLM and the ViTs.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir

from deploy.artifact.tensors import Feed
from deploy.calibration.histogram import Histogram
from deploy.calibration.thresholds import Method, threshold
from deploy.precision.codes import INT8, Codes
from deploy.precision.cpu import STREAMS, CpuGraph
from deploy.precision.int8.options import FP8_METHOD, STEPPED
from deploy.precision.int8.placement import QUANTIZED, Placement

CANDIDATES: tuple[tuple[Method, float], ...] = (
    ("percentile", 99.99),
    ("percentile", 99.999),
    ("percentile", 99.9999),
    ("entropy", 100),
    ("mse", 100),
    ("max", 100),
)
"""Where a range may end."""

BETTER = 4.0
"""The first candidate is taken unless its error is more than so many times that of another one (6 dB)."""

_ALIKE = 1.01
"""Candidates that differ by less than this factor are one."""

_OUTPUT = "energy"


def best_ranges(
    model: ir.Model, placement: Placement, histograms: Mapping[str, Histogram], samples: Sequence[Feed], codes: Codes
) -> dict[str, float]:
    """The largest magnitude to hold, by tensor of `placement.edges`; 0 where all values are 0.

    model: prepared, FP32. samples: these tensors on some rows of data; the errors are measured on them. The range of a tensor
    in a branch that no sample ran is that of the data. Raises PrecisionError.
    """
    nodes = {node.name or "": node for node in model.graph.all_nodes()}
    operands: dict[str, dict[int, str]] = {}
    for tensor, uses in placement.edges.items():
        for node, index in uses:
            operands.setdefault(node, {})[index] = tensor

    def choose(item: tuple[str, tuple[tuple[str, int], ...]]) -> float:
        tensor, uses = item
        tokens = any(nodes[name].op_type == "MatMul" for name, _ in uses)
        candidates = _distinct(
            histograms[tensor], FP8_METHOD if codes is not INT8 else "entropy" if tokens else "percentile", codes
        )
        if len(candidates) == 1 or not any(tensor in sample for sample in samples):
            return max(candidates)
        errors = np.zeros(len(candidates))
        for name, index in uses:
            errors += _errors(model, nodes[name], operands[name], index, candidates, samples, codes)
        return candidates[0 if errors[0] <= BETTER * errors.min() else int(np.argmin(errors))]

    with ThreadPoolExecutor(STREAMS, thread_name_prefix="ranges") as pool:
        return dict(zip(placement.edges, pool.map(choose, placement.edges.items()), strict=True))


def _distinct(histogram: Histogram, first: str, codes: Codes) -> list[float]:
    """The candidates that differ, those of the method `first` before the others."""
    found: list[float] = []
    for method, percentile in sorted(CANDIDATES, key=lambda candidate: candidate[0] != first):
        if codes is not INT8 and method in STEPPED:
            continue
        amax = threshold(histogram, method, percentile=percentile)
        if all(amax > other * _ALIKE or other > amax * _ALIKE for other in found):
            found.append(amax)
    return found or [0.0]


def _errors(
    model: ir.Model,
    node: ir.Node,
    operands: Mapping[int, str],
    index: int,
    candidates: Sequence[float],
    samples: Sequence[Feed],
    codes: Codes,
) -> np.ndarray:
    """The energy of the error at the output of `node`, relative to that of the output, for each candidate of input `index`."""
    layer = _Layer(model, node, operands, index) if node.op_type in QUANTIZED else None
    signal, errors = 0.0, np.zeros(len(candidates))
    for sample in samples:
        if not all(tensor in sample for tensor in operands.values()):
            continue  # it ran the other branch
        exact = sample[operands[index]]
        signal += layer.energy(exact, sample) if layer else float(np.square(exact, dtype=np.float64).sum())
        for place, amax in enumerate(candidates):
            off = exact - codes.read_back(exact, codes.scale_of(amax))
            errors[place] += layer.energy(off, sample) if layer else float(np.square(off, dtype=np.float64).sum())
    return errors / signal if signal else errors


class _Layer:
    """A node alone, without its bias, and the energy of its output: it is linear in input `index`."""

    def __init__(self, model: ir.Model, node: ir.Node, operands: Mapping[int, str], index: int) -> None:
        self._index = index
        self._others = {other: tensor for other, tensor in operands.items() if other != index}
        self._constants: dict[str, np.ndarray] = {}
        inputs: list[ir.Value] = []
        for place, value in enumerate(node.inputs[:2]):
            assert value is not None
            inputs.append(ir.Value(name=f"input{place}", type=ir.TensorType(ir.DataType.FLOAT)))
            if place not in operands:
                assert value.const_value is not None
                self._constants[f"input{place}"] = value.const_value.numpy()
        result = ir.Value(name="output", type=ir.TensorType(ir.DataType.FLOAT))
        energy = ir.Value(name=_OUTPUT, type=ir.TensorType(ir.DataType.FLOAT))
        twin = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=[result], name="layer")
        total = ir.Node("", "ReduceSumSquare", [result], [ir.AttrInt64("keepdims", 0)], outputs=[energy])
        graph = ir.Graph(inputs, [energy], nodes=[twin, total], opset_imports=dict(model.opset_imports), name="layer")
        self._run = CpuGraph(ir.Model(graph, ir_version=model.ir_version), streams=STREAMS)

    def energy(self, array: np.ndarray, sample: Feed) -> float:
        """The sum of the squares of the output. array: in place of the input; sample: has the other operand, if there is one."""
        feed = {f"input{place}": sample[tensor] for place, tensor in self._others.items()}
        feed[f"input{self._index}"] = np.ascontiguousarray(array)
        return float(self._run(self._constants | feed)[_OUTPUT])
