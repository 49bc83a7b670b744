"""The range of every activation of an FP32 graph, measured on data."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploy.precision.cpu import CpuGraph
from deploy.precision.graph import unused


@dataclass(frozen=True, kw_only=True)
class Range:
    """Smallest and largest element of one tensor over all feeds, without NaN, and whether there was a NaN.

    An infinity counts as an element: if `low` is -inf, the smallest finite element is not known.
    """

    low: float
    high: float
    nan: bool = False

    @property
    def amax(self) -> float:
        """The largest finite magnitude at either end; 0 when no end is finite."""
        return max((abs(end) for end in (self.low, self.high) if math.isfinite(end)), default=0.0)

    @property
    def finite(self) -> bool:
        return not self.nan and math.isfinite(self.low) and math.isfinite(self.high)

    def merge(self, other: "Range") -> "Range":
        return Range(low=min(self.low, other.low), high=max(self.high, other.high), nan=self.nan or other.nan)


def activation_ranges(model: ir.Model, feeds: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Range]:
    """Ranges by name of all float32 inputs and node outputs of a prepared model, without those of its subgraphs.

    The graph reduces every tensor to three numbers as it runs, so that memory does not grow with the number of feeds or
    tensors. Empty tensors have no range. Raises PrecisionError when a feed cannot be run.
    """
    probed = model.clone()
    probes = _add_probes(probed.graph)
    run = CpuGraph(probed)
    del probed
    ranges: dict[str, Range] = {}
    for feed in feeds:
        results = run(feed)
        for name, (low_name, high_name, sum_name) in probes.items():
            low, high, total = (float(results[probe]) for probe in (low_name, high_name, sum_name))
            # The sum is NaN with any NaN, but also with infinities of both signs; min and max may pass over a NaN.
            nan = math.isnan(low) or math.isnan(high) or (math.isnan(total) and not (low == -math.inf and high == math.inf))
            seen = Range(low=math.inf if math.isnan(low) else low, high=-math.inf if math.isnan(high) else high, nan=nan)
            if nan or seen.low <= seen.high:
                ranges[name] = seen.merge(ranges[name]) if name in ranges else seen
    return ranges


def _add_probes(graph: ir.Graph) -> dict[str, tuple[str, str, str]]:
    """Replace the outputs of `graph` by the smallest element, the largest and the sum of every float tensor; returns their names."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs if value.name)]
    taken = {value.name for value in (*values, *graph.initializers.values())}
    probes: dict[str, tuple[str, str, str]] = {}
    graph.outputs.clear()
    for value in values:
        if value.dtype != ir.DataType.FLOAT or not isinstance(value.type, ir.TensorType) or value.name is None:
            continue
        names = []
        for op in ("ReduceMin", "ReduceMax", "ReduceSum"):
            result = ir.Value(name=unused(f"{value.name}_{op}", taken), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
            taken.add(result.name)
            node = ir.Node("", op, [value], [ir.AttrInt64("keepdims", 0)], outputs=[result], name=f"{result.name}")
            producer = value.producer()
            if producer is not None:
                graph.insert_after(producer, node)
            else:
                graph.append(node)
            graph.outputs.append(result)
            names.append(result.name or "")
        probes[value.name] = (names[0], names[1], names[2])
    return probes
