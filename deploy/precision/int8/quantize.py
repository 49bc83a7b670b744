"""INT8 of an ONNX graph in memory: calibrated, corrected, audited, compared with FP32."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Calibration, Exclusion, LayerNoise
from deploy.artifact.onnxfile import save_model
from deploy.artifact.tensors import Feed
from deploy.calibration.histogram import Histogram
from deploy.calibration.thresholds import METHODS, Method, threshold
from deploy.data.calibration_set import CalibrationSet
from deploy.errors import ParityError, UsageError
from deploy.evidence.parity import TOLERANCES, Parity, compare
from deploy.host.versions import tool_versions
from deploy.precision.cpu import ONNXRUNTIME_VERSION, CpuGraph
from deploy.precision.graph import prepare
from deploy.precision.half.convert import to_half
from deploy.precision.half.emulate import emulate
from deploy.precision.half.keep import nodes_to_keep
from deploy.precision.int8 import cache
from deploy.precision.int8.audit import Audit
from deploy.precision.int8.cache import Calibrated
from deploy.precision.int8.equalize import equalize
from deploy.precision.int8.folding import fold_batchnorm
from deploy.precision.int8.halfscales import SMALLEST_FP16, subnormal_scales
from deploy.precision.int8.histograms import Activations, collect, scale_of
from deploy.precision.int8.placement import Placement, Selection, place
from deploy.precision.int8.rewrite import to_int8
from deploy.precision.int8.rows import Rows, first_rows, row_count
from deploy.precision.ranges import activation_ranges
from deploy.progress import Progress, silent

logger = logging.getLogger(__name__)

METHOD = "percentile"
"""The method used where none is asked for: it loses least on the benchmarks (docs/int8.md)."""
OPSET = 19
"""The first opset in which Q/DQ pairs may have FP16 scales, as the FP16 pass over a quantized graph makes them."""
PARITY_ROWS = 4
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How to quantize.

    method: how the largest magnitude that INT8 is to hold is chosen for an activation: see `calibration.thresholds`.
    percentile: per cent of the magnitudes that `percentile` keeps.
    batch_size: rows of one run while calibrating; the scales do not depend on it.
    per_tensor: one scale for a weight, not one for each of its output channels.
    exclude: nodes to leave in floating point: names of nodes or modules, operators (`Gemm`) or patterns (`layer4*`).
    float_first, float_last: leave the first or the last layers with weights in floating point.
    bias_correction: take the mean error of each layer away with its bias.
    equalize: equalize ranges across layers first; None: with `per_tensor`, and where there are depthwise convolutions.
    floats: the precision of what is not INT8. With `fp16` the scales are FP16 too, so that no Cast stands between layers.
    """

    method: str = METHOD
    percentile: float = 99.99
    batch_size: int = 2
    per_tensor: bool = False
    exclude: tuple[str, ...] = ()
    float_first: bool = False
    float_last: bool = False
    bias_correction: bool = True
    equalize: bool | None = None
    floats: Literal["fp32", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; expected one of {', '.join(METHODS)}")
        if not 50 <= self.percentile <= 100:
            raise UsageError(f"the percentile must be 50 to 100, not {self.percentile:g}")
        if self.batch_size < 1:
            raise UsageError(f"the batch size must be 1 or more, not {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A graph with Q/DQ pairs, the nodes left in floating point, its calibration and its parity with the FP32 graph.

    parity: None until it has been compared; never of `quantize_onnx`.
    """

    model: onnx.ModelProto
    exclusions: list[Exclusion]
    calibration: Calibration
    parity: Parity | None

    def save(self, path: Path) -> None:
        """Write the ONNX file, with the weights beside it where they exceed 2 GB. Raises OSError."""
        save_model(ir.from_proto(self.model), path)


def quantize_onnx(artifact: Artifact, data: CalibrationSet, options: QuantizeOptions, progress: Progress = silent) -> Quantized:
    """Quantize the graph of `artifact`, which is in FP32, in memory, or take scales and corrections from the cache.

    Raises PrecisionError for a graph that cannot be quantized or makes numbers that are not finite, ParityError, DataError
    and BackendError (ONNX Runtime is not installed).
    """
    request = quantize_request(artifact, data, options)
    progress("reading the graph")
    prepared = fold_batchnorm(prepare(onnx.load(artifact.onnx_path), opset=OPSET))
    if _equalizes(prepared, options):
        prepared, pairs = equalize(prepared)
        if pairs:
            logger.info("equalized the ranges of %d layers with those behind them", len(pairs))
    selection = Selection(exclude=options.exclude, float_first=options.float_first, float_last=options.float_last)
    known = cache.read(request) if request is not None else None
    if known is not None:
        logger.info("calibration found in %s", cache.folder())
        return _quantized(prepared, selection, known, options)
    known, references = _calibrate(prepared, selection, data, options, progress)
    progress("comparing with FP32")
    quantized = _quantized(prepared, selection, known, options)
    if known.record.equalized:  # it must not have changed what the model computes
        exact = CpuGraph(onnx.load(artifact.onnx_path))
        references = [(feed, exact(feed)) for feed, _ in references]
    known = dataclasses.replace(known, parity=_parity(artifact, quantized.model, references, known.record))
    if request is not None:
        cache.write(request, known)
    return dataclasses.replace(quantized, parity=known.parity)


def quantize_request(artifact: Artifact, data: CalibrationSet, options: QuantizeOptions) -> dict[str, Any] | None:
    """Everything that scales and corrections depend on; None when the data can be read only once."""
    content = data.digest()
    if content is None:
        return None
    return {
        "parent": artifact.manifest.digest,
        "data": content,
        "options": quantize_settings(options),
        "tools": tool_versions(),
    }


def quantize_settings(options: QuantizeOptions) -> dict[str, Any]:
    """The options that the result depends on."""
    return {key: value for key, value in dataclasses.asdict(options).items() if key != "batch_size"}


def hint(calibration: Calibration | None) -> str:
    """Which layers to leave in floating point first, for an error message."""
    if calibration is None:
        return "quantize again with another --method, or leave layers in floating point with --exclude"
    worst = ", ".join(
        f"{layer.node} ({layer.sqnr_db:.0f} dB)" for layer in calibration.layers[:_NAMED] if layer.sqnr_db is not None
    )
    return f"the most sensitive layers: {worst}; leave them in floating point with --exclude, or try another --method"


def _equalizes(model: onnx.ModelProto, options: QuantizeOptions) -> bool:
    if options.equalize is not None:
        return options.equalize
    depthwise = any(
        attribute.name == "group" and attribute.i > 1
        for node in model.graph.node
        if node.op_type == "Conv"
        for attribute in node.attribute
    )
    return options.per_tensor or depthwise


def _calibrate(
    prepared: onnx.ModelProto,
    selection: Selection,
    data: CalibrationSet,
    options: QuantizeOptions,
    progress: Progress,
) -> tuple[Calibrated, list[tuple[Feed, Feed]]]:
    """The calibration, and feeds of PARITY_ROWS rows with what the FP32 graph makes of them."""
    placement = place(prepared, selection)
    rows = Rows(data, options.batch_size, progress)
    activations = Activations(prepared, list(placement.edges))
    histograms = collect(activations, rows, rows.seen)
    if not rows.count:
        raise UsageError("there is no calibration data: at least one feed is needed")
    scales = _scales(histograms, placement, options)
    progress("measuring each layer")
    audit = Audit(prepared, placement, scales, per_tensor=options.per_tensor)
    references: list[tuple[Feed, Feed]] = []
    for feed, run in rows.kept:
        tensors, outputs = run or activations(feed)
        audit.add(tensors, row_count(feed))
        if (missing := PARITY_ROWS - sum(row_count(compared) for compared, _ in references)) > 0:
            references.append(first_rows(feed, outputs, data, missing))
        del run, tensors, outputs  # before the next feed makes as much again
    feeds = rows.release()
    del activations
    errors = audit.finish()
    del audit
    corrected = options.bias_correction
    layers = sorted((error.sqnr_db if corrected else error.sqnr_uncorrected_db, name) for name, error in errors.items())
    known = Calibrated(
        scales=scales,
        bias={name: error.mean for name, error in errors.items() if error.mean is not None} if corrected else {},
        keep=nodes_to_keep(prepared, activation_ranges(prepared, feeds), "fp16") if options.floats == "fp16" else {},
        record=Calibration(
            data=data.digest(),
            kind=data.kind,
            rows=rows.count,
            skipped=list(data.skipped),
            method=options.method,
            per_tensor=options.per_tensor,
            bias_correction=corrected,
            equalized=_equalizes(prepared, options),
            floats=options.floats,
            layers=[LayerNoise(node=name, sqnr_db=round(value, 2) if math.isfinite(value) else None) for value, name in layers],
        ),
    )
    return known, references


def _quantized(prepared: onnx.ModelProto, selection: Selection, known: Calibrated, options: QuantizeOptions) -> Quantized:
    """The graph in INT8, and in FP16 where that is asked for, with the nodes that are not, and the evidence so far."""
    placement = place(prepared, selection)
    if options.floats == "fp32":
        model = to_int8(prepared, placement, known.scales, per_tensor=options.per_tensor, bias=known.bias)
        exclusions = list(placement.excluded)
    else:
        small = subnormal_scales(prepared, placement, known.scales, per_tensor=options.per_tensor)
        placement = place(prepared, selection, stay={**small, **known.keep})
        bias = {name: shift for name, shift in known.bias.items() if name in placement.nodes}
        int8 = to_int8(prepared, placement, known.scales, per_tensor=options.per_tensor, bias=bias, smallest=SMALLEST_FP16)
        model, left = to_half(int8, "fp16", keep=known.keep)
        exclusions = list({exclusion.node: exclusion for exclusion in [*placement.excluded, *left]}.values())
    return Quantized(model=model, exclusions=exclusions, calibration=known.record, parity=known.parity)


def _scales(histograms: Mapping[str, Histogram], placement: Placement, options: QuantizeOptions) -> dict[str, float]:
    """The scale of every tensor, that of the widest in each group."""
    method: Method = options.method  # type: ignore[assignment]  # checked by QuantizeOptions
    amax = {name: threshold(histogram, method, percentile=options.percentile) for name, histogram in histograms.items()}
    for group in placement.groups:
        amax |= dict.fromkeys(group, max(amax[name] for name in group))
    if dead := [name for name, value in amax.items() if value == 0]:
        logger.warning("always 0 on the calibration data: %s", ", ".join(dead[:10]) + ("..." if len(dead) > 10 else ""))
    return {name: scale_of(value) for name, value in amax.items()}


def _parity(artifact: Artifact, model: onnx.ModelProto, references: Sequence[tuple[Feed, Feed]], record: Calibration) -> Parity:
    """Compare the quantized graph with what the FP32 graph gave on calibration data."""
    mixed = record.floats == "fp16"
    run = CpuGraph(emulate(model) if mixed else model)
    data = "images" if record.kind == "images" else "feeds"
    what = f"{artifact.shown} in INT8"
    try:
        cases = [
            compare(run(feed), expected, TOLERANCES["int8"], data=data, batch=row_count(feed), what=what)
            for feed, expected in references
        ]
    except ParityError as error:
        raise ParityError(f"{error}; nothing was written\n{hint(record)}") from error
    return Parity(
        against=artifact.manifest.digest,
        by=f"{'emulation on ' * mixed}onnxruntime {ONNXRUNTIME_VERSION}",
        tolerance=TOLERANCES["int8"],
        cases=cases,
    )
