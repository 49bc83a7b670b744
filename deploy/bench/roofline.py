"""The roofline model: the share of the machine's speed that a candidate reaches (Williams, Waterman, Patterson, CACM 52(4), 2009)."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import TensorSpec
from deploy.precision.macs import count_macs

_SIDES = (512, 768, 1536)
"""Rows and columns of the matrices to multiply: which size is fastest depends on the caches."""

_COPIED = 96 << 20
"""Bytes to copy: more than the caches hold."""

_SECONDS = 0.4


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The best speeds of this machine: FP32 operations a second of a matrix product, bytes a second of a copy (read and written)."""

    flops: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one run.

    operations: two for each multiply-accumulate of Conv, ConvTranspose, Gemm and MatMul. nbytes: the least that must be moved,
    which is every weight, input and output once.
    """

    operations: int
    nbytes: int


def measure_peak() -> Peak:
    """Time a matrix product and a copy on the processor, with numpy's own number of threads: the best of many runs.

    This is the speed that a library reaches, not that of the data sheet: other kernels may be a little faster.
    """
    rng = np.random.default_rng(0)
    flops = 0.0
    for side in _SIDES:
        a, b = (rng.standard_normal((side, side), dtype=np.float32) for _ in range(2))
        flops = max(flops, 2 * side**3 / _best(partial(np.matmul, a, b, out=np.empty_like(a))))
    source = np.ones(_COPIED // 8)
    target = np.empty_like(source)
    copy_s = _best(lambda: np.copyto(target, source))
    return Peak(flops=flops, bytes_per_s=2 * _COPIED / copy_s)


def _best(run: Callable[[], object]) -> float:
    run()
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not seconds or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def count_work(artifact: Artifact, sizes: Mapping[str, int]) -> Work | None:
    """The work of one run with these sizes of symbolic dimensions; None if it cannot be counted from the graph.

    The graph of a package is that of the export that it was compiled from.
    """
    if artifact.manifest.kind == "package":
        artifact = artifact.root()
    manifest = artifact.manifest
    shapes = {spec.name: spec.concrete(sizes) for spec in manifest.inputs}
    model = ir.load(artifact.onnx_path)
    counts = count_macs(model, shapes).values()
    macs = [count for count in counts if count is not None]
    if len(macs) < len(counts):
        return None
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ends = 0
    for spec in (*manifest.inputs, *manifest.outputs):
        if any(dim not in sizes for dim in spec.dynamic):
            return None
        ends += _size(spec, sizes)
    return Work(operations=2 * sum(macs), nbytes=weights + ends)


def attainable(work: Work, peak: Peak) -> float:
    """Operations a second that the roof allows: the peak, or less if moving the bytes takes longer."""
    if not work.operations:
        return 0.0
    return min(peak.flops, work.operations / work.nbytes * peak.bytes_per_s)


def _size(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    itemsize = 2 if spec.dtype == "bfloat16" else np.dtype(spec.dtype).itemsize
    return int(np.prod(spec.concrete(sizes), dtype=np.int64)) * itemsize
