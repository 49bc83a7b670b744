"""Quantizing the graph of an artifact in memory: calibration, bias correction and audit."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Calibration, Exclusion, LayerNoise
from deploy.artifact.onnxfile import load_model, save_model
from deploy.artifact.tensors import Feed, Profile, row_count
from deploy.calibration.histogram import Histogram
from deploy.calibration.thresholds import Method, threshold
from deploy.data.calibration_set import CalibrationSet
from deploy.data.evidence_feeds import first_rows as first_feeds
from deploy.errors import PrecisionError, UsageError
from deploy.precision.checked import check_prepared
from deploy.precision.codes import CODES
from deploy.precision.constants import FoldConstants
from deploy.precision.half.keep import nodes_to_keep
from deploy.precision.half.rewrite import ToHalf
from deploy.precision.int8 import cache
from deploy.precision.int8.audit import Audit, LayerError
from deploy.precision.int8.branches import ShareScope
from deploy.precision.int8.cache import Calibrated, CpuRanges
from deploy.precision.int8.channels import ROWS, choose_channels
from deploy.precision.int8.choose import best_ranges
from deploy.precision.int8.cpu_form import CpuForm, cpu_form, cpu_ranges
from deploy.precision.int8.equalize import equalize
from deploy.precision.int8.folding import FoldBatchNorm
from deploy.precision.int8.halfscales import SMALLEST_FP16, subnormal_scales
from deploy.precision.int8.histograms import Activations, collect
from deploy.precision.int8.options import AUTO, OPSET, QuantizeOptions, quantize_request
from deploy.precision.int8.placement import NothingToQuantizeError, Placement, Selection, place
from deploy.precision.int8.rewrite import ToCodes
from deploy.precision.int8.rows import Rows, first_rows
from deploy.precision.int8.rules import slow_in_engine
from deploy.precision.int8.scales import scales_of
from deploy.precision.int8.share import asked_of, layer_macs, quantized_share
from deploy.precision.int8.smooth import Channels, Smooth
from deploy.precision.int8.stored import Stored
from deploy.precision.prepare import Prepare
from deploy.precision.ranges import activation_ranges
from deploy.progress import Progress, silent

logger = logging.getLogger(__name__)

PARITY_ROWS = 4
_NAMED = 3
_UNRUN = "no calibration data runs the branch of If that it is in"


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A model with Q/DQ pairs, the nodes left in floating point, and its calibration.

    feeds: rows of the calibration data to compare it on, `PARITY_ROWS` or a little more.
    expected: what the file of the source makes of `feeds`; none where it was not run. stored: what the file must hold.
    cpu: the same network in the form for ONNX Runtime on the CPU; None where it was not asked for.
    """

    model: ir.Model
    cpu: CpuForm | None
    exclusions: list[Exclusion]
    calibration: Calibration
    feeds: list[Feed]
    expected: list[Feed]
    stored: Stored

    def save(self, path: Path) -> None:
        """Write the ONNX file, with large weights beside it. Raises OSError, and ParityError if it does not hold what it must."""
        save_model(self.model, path)
        self.stored.check(path)


@dataclass(frozen=True, kw_only=True)
class CalibratedGraph:
    """A prepared FP32 graph with its calibration, of which any layers can be quantized without calibrating again.

    feeds, expected: as of `Quantized`.
    """

    model: ir.Model
    selection: Selection
    options: QuantizeOptions
    known: Calibrated
    feeds: list[Feed]
    expected: list[Feed]

    def placement(self, engine: Profile | None = None) -> Placement:
        """Where pairs go if every layer is quantized that can be. engine: as of `quantize_onnx`."""
        placement = _placed(self.model, self.selection, self.known.noisy, self.known.scales)
        return _without_slow(self, placement, self.known.noisy, engine)[0]

    def quantized(self, *, stay: Mapping[str, str], cpu: bool, engine: Profile | None = None) -> Quantized:
        """A quantized copy in which the nodes of `stay`, by name with the reason, are in floating point. cpu, engine: as of `quantize_onnx`.

        Raises PrecisionError.
        """
        return _quantized(replace(self, model=self.model.clone()), self.macs, stay=stay, cpu=cpu, engine=engine)

    @cached_property
    def macs(self) -> dict[str, int]:
        """The multiply-accumulates of the layers with weights, by name."""
        return layer_macs(self.model, self.feeds[0])


def quantize_onnx(
    artifact: Artifact,
    data: CalibrationSet,
    options: QuantizeOptions,
    progress: Progress = silent,
    *,
    cpu: bool = False,
    engine: Profile | None = None,
) -> Quantized:
    """Quantize the FP32 graph of `artifact` in memory; scales and corrections come from the cache if it has them.

    cpu: make the form for ONNX Runtime on the CPU too; of INT8 alone. engine: the first profile of the engine that the graph is
    for; layers that TensorRT has no fast kernels for stay in floating point then.

    Raises PrecisionError for a graph that cannot be quantized, that makes numbers that are not finite, or that would compute
    something else after the preparation; DataError, and BackendError (ONNX Runtime is not installed).
    """
    graph = calibrate_onnx(artifact, data, options, progress)
    return _quantized(graph, graph.macs, stay={}, cpu=cpu, engine=engine)


def calibrate_onnx(
    artifact: Artifact, data: CalibrationSet, options: QuantizeOptions, progress: Progress = silent
) -> CalibratedGraph:
    """Prepare the FP32 graph of `artifact` in memory and calibrate it, from the cache if it can. Raises what `quantize_onnx` does."""
    request = quantize_request(artifact, data, options)
    progress("reading the graph")
    model = load_model(artifact.onnx_path)
    Prepare(opset=OPSET)(model)
    FoldConstants()(model)
    FoldBatchNorm()(model)
    ShareScope()(model)
    equalized = equalize(model, options)
    if equalized:
        logger.info("equalized the ranges of %d layers with those behind them", len(equalized))
    selection = Selection(
        exclude=options.exclude,
        include=options.include,
        float_first=options.float_first,
        float_last=options.float_last,
        codes=options.precision,
    )
    _check_layers(model, selection, options)
    known = cache.read(request) if request is not None else None
    if known is not None:
        logger.info("calibration found in %s", cache.folder())
        Smooth(place(model, selection), known.channels)(model)
        feeds = first_feeds(data, options.batch_size, PARITY_ROWS)
        return CalibratedGraph(model=model, selection=selection, options=options, known=known, feeds=feeds, expected=[])
    known, references = _calibrate(model, selection, data, options, progress, equalized=bool(equalized))
    expected = check_prepared(artifact, references)
    if request is not None:
        cache.write(request, known)
    feeds = [feed for feed, _ in references]
    return CalibratedGraph(model=model, selection=selection, options=options, known=known, feeds=feeds, expected=expected)


def hint(calibration: Calibration | None) -> str:
    """Which layers to leave in floating point first, for an error message."""
    if calibration is None:
        return "quantize again with another `method`, or leave layers in floating point with `exclude`"
    worst = ", ".join(
        f"{layer.node} ({layer.sqnr_db:.0f} dB)" for layer in calibration.layers[:_NAMED] if layer.sqnr_db is not None
    )
    return f"the most sensitive layers: {worst}; leave them in floating point with `exclude`, or try another `method`"


def _calibrate(
    model: ir.Model,
    selection: Selection,
    data: CalibrationSet,
    options: QuantizeOptions,
    progress: Progress,
    *,
    equalized: bool,
) -> tuple[Calibrated, list[tuple[Feed, Feed]]]:
    """The calibration, and feeds of PARITY_ROWS rows in total with the outputs of the FP32 graph for them."""
    codes = CODES[options.precision]
    rows = Rows(data, options.batch_size, progress)
    channels = _smoothed(model, selection, rows, options, progress)
    every = place(model, selection)
    activations = Activations(model, list(every.edges))
    histograms = collect(activations, rows, rows.seen)
    if not rows.count:
        raise UsageError("there is no calibration data: at least one feed is needed")
    histograms = {name: histogram for name, histogram in histograms.items() if histogram.total}
    placement = _placed(model, selection, {}, histograms)
    if left := len(every.nodes) - len(placement.nodes):
        logger.warning("%d layers stay in floating point: no calibration data runs the branch of If that they are in", left)
    if options.chosen_method == AUTO:
        progress("comparing ranges at the layers that read them")
        amax = best_ranges(model, placement, histograms, [activations(feed)[0] for feed in rows.sample()], codes)
    else:
        amax = _thresholds(histograms, options)
    scales = scales_of(placement, amax, codes)
    progress("measuring each layer")
    audit = Audit(model, placement, scales.own, joint=scales.joint, codes=codes, per_tensor=options.per_tensor)
    references: list[tuple[Feed, Feed]] = []
    for feed, run in rows.runs():
        tensors, outputs = run or activations(feed)
        audit.add(tensors, row_count(feed))
        if (missing := PARITY_ROWS - sum(row_count(compared) for compared, _ in references)) > 0:
            references.append(first_rows(feed, outputs, data, missing))
        del run, tensors, outputs  # before the next feed takes as much memory again
    del activations
    errors = audit.finish()
    del audit
    noisy, layers = _noise(errors, options)
    feeds = [feed for feed, _ in rows.kept]
    known = Calibrated(
        scales=scales.own,
        joint=scales.joint,
        channels=channels,
        bias=_biases(errors, options),
        noisy=noisy,
        cpu=_cpu_ranges(model, _placed(model, selection, noisy, scales.own), histograms, scales.own, feeds, options),
        keep=nodes_to_keep(model, activation_ranges(model, feeds), "fp16") if options.floats == "fp16" else {},
        record=Calibration(
            data=data.digest(),
            kind=data.kind,
            rows=rows.count,
            skipped=list(data.skipped),
            method=options.chosen_method,
            per_tensor=options.per_tensor,
            bias_correction=options.bias_correction,
            equalized=equalized,
            smoothed=sorted(channels),
            floats=options.floats,
            layers=layers,
        ),
    )
    return known, references


def _thresholds(histograms: Mapping[str, Histogram], options: QuantizeOptions) -> dict[str, float]:
    method: Method = options.chosen_method  # type: ignore[assignment]  # checked by QuantizeOptions, and not `auto`
    return {name: threshold(each, method, percentile=options.percentile) for name, each in histograms.items()}


def _biases(errors: Mapping[str, LayerError], options: QuantizeOptions) -> dict[str, np.ndarray]:
    """What is added to biases: the mean errors, unless that is switched off."""
    means = {name: error.mean for name, error in errors.items() if error.mean is not None}
    return means if options.bias_correction else {}


def _check_layers(model: ir.Model, selection: Selection, options: QuantizeOptions) -> None:
    """Raise PrecisionError where there is nothing to quantize, saying how to have FP16 alone if that was asked for too."""
    try:
        place(model, selection)
    except NothingToQuantizeError as error:
        if options.fp16:
            raise PrecisionError(
                f"{error}; for FP16 alone, leave {options.precision.upper()} out: `deploy convert --fp16`"
            ) from error
        raise


def _smoothed(
    model: ir.Model, selection: Selection, rows: Rows, options: QuantizeOptions, progress: Progress
) -> dict[str, Channels]:
    """Smooth `model` in place, by what the first rows say; returns by what."""
    progress("evening out channels")
    placement = place(model, selection)
    channels = choose_channels(
        model,
        placement,
        rows.head(ROWS),
        CODES[options.precision],
        per_tensor=options.per_tensor,
        corrected=options.bias_correction,
        # A shift makes large biases, and ONNX Runtime divides those of convolutions by scales in FP16, where the codes overflow
        # (WeightBiasQuantization, seen with 1.32).
        maps=options.floats == "fp32",
    )
    Smooth(placement, channels)(model)
    return channels


def _noise(errors: Mapping[str, LayerError], options: QuantizeOptions) -> tuple[dict[str, str], list[LayerNoise]]:
    """The nodes that lose too much, with the reason, and the noise of the others, the noisiest first."""
    noise = {name: error.sqnr_db if options.bias_correction else error.sqnr_uncorrected_db for name, error in errors.items()}
    noisy = {
        name: f"its signal to quantization noise is {value:.0f} dB, below {options.keep_below:g} (`keep_below`)"
        for name, value in noise.items()
        if value < options.keep_below
    }
    layers = sorted((value, name) for name, value in noise.items() if name not in noisy)
    return noisy, [LayerNoise(node=name, sqnr_db=round(value, 2) if math.isfinite(value) else None) for value, name in layers]


def _placed(model: ir.Model, selection: Selection, stay: Mapping[str, str], measured: Collection[str]) -> Placement:
    """Where pairs go if the nodes of `stay` are in floating point, and those that would read a tensor which is not `measured`.

    Such a tensor is in a branch that no feed ran, or it would be the skip of a sum only because the layer of `stay` is not.
    """
    placement = place(model, selection, stay=stay)
    while unseen := _never_run(placement, measured):
        stay = {**unseen, **stay}
        placement = place(model, selection, stay=stay)
    return placement


def _never_run(placement: Placement, measured: Collection[str]) -> dict[str, str]:
    """The nodes that read a tensor which is not among the measured ones, with the reason."""
    return {node: _UNRUN for tensor, uses in placement.edges.items() if tensor not in measured for node, _ in uses}


def _quantized(
    graph: CalibratedGraph, macs: Mapping[str, int], *, stay: Mapping[str, str], cpu: bool, engine: Profile | None
) -> Quantized:
    """Quantize the model of `graph` in place but for the nodes of `stay`, and convert it to FP16 where that is asked for.

    macs: as of `layer_macs`.
    """
    model, selection, known, options = graph.model, graph.selection, graph.known, graph.options
    left = {**stay, **known.noisy}
    codes = CODES[selection.codes]
    placement = _placed(model, selection, left, known.scales)
    form = cpu_form(model, placement, known, per_tensor=options.per_tensor) if cpu else None
    half = options.floats == "fp16"
    placement, slow = _without_slow(graph, placement, left, engine)
    smallest = SMALLEST_FP16 if half else 0.0
    scales = {tensor: max(scale, smallest) for tensor, scale in known.scales.items()}
    unrun = {each.node for each in placement.excluded if each.reason == _UNRUN}
    share = quantized_share(
        macs,
        placement,
        codes=selection.codes,
        asked=asked_of(model, selection) | unrun | slow.keys() | stay.keys(),
        least=options.min_share / 100,
    )
    bias = {name: correction for name, correction in known.bias.items() if name in placement.nodes}
    stored = Stored.of(model, placement, scales, known.joint, bias, codes)
    to_codes = ToCodes(placement, scales, codes, joint=known.joint, bias=bias, per_tensor=options.per_tensor, smallest=smallest)
    to_codes(model)
    exclusions = list(placement.excluded)
    if half:
        to_half = ToHalf("fp16", keep=known.keep)
        to_half(model)
        exclusions = list({exclusion.node: exclusion for exclusion in [*exclusions, *to_half.exclusions]}.values())
    record = msgspec.structs.replace(known.record, share=share)
    return Quantized(
        model=model,
        cpu=form,
        exclusions=exclusions,
        calibration=record,
        feeds=graph.feeds,
        expected=graph.expected,
        stored=stored,
    )


def _without_slow(
    graph: CalibratedGraph, placement: Placement, left: Mapping[str, str], engine: Profile | None
) -> tuple[Placement, dict[str, str]]:
    """`placement`, which leaves out the nodes of `left`, without those that are slow in an engine, which are the second, and those that
    FP16 beside them keeps in FP32."""
    model, selection, known, options = graph.model, graph.selection, graph.known, graph.options
    half = options.floats == "fp16"
    slow = slow_in_engine(model, placement.nodes, placement.included, selection.codes, engine) if engine is not None else {}
    codes = CODES[selection.codes]
    small = subnormal_scales(model, placement, known.scales, codes, per_tensor=options.per_tensor) if half else {}
    if slow or half:
        placement = _placed(model, selection, {**slow, **small, **(known.keep if half else {}), **left}, known.scales)
    return placement, slow


def _cpu_ranges(
    model: ir.Model,
    placement: Placement,
    histograms: Mapping[str, Histogram],
    scales: Mapping[str, float],
    feeds: list[Feed],
    options: QuantizeOptions,
) -> CpuRanges:
    """What the CPU form needs; nothing for FP8, which has none."""
    if options.fp8:
        return CpuRanges(scales={}, lows={})
    return cpu_ranges(model, placement, histograms, scales, feeds, per_tensor=options.per_tensor)
