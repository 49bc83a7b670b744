"""The stage `quantize`: an FP32 ONNX artifact in INT8 or FP8 with explicit Q/DQ, calibrated, corrected and checked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX, Manifest, Stage
from deploy.artifact.writer import ArtifactWriter
from deploy.data.calibration_set import CalibrationSet, calibration_set
from deploy.data.evidence_feeds import calibration_feeds
from deploy.errors import UsageError
from deploy.evaluation.gate import Gate, Reference
from deploy.evaluation.options import IGNORE, MetricOptions
from deploy.evidence.options import ToleranceOptions
from deploy.evidence.parity import TOLERANCES, Tolerance
from deploy.options import collect, option
from deploy.pipeline.artifact_cache import QUANTIZED_CACHE
from deploy.pipeline.stage import PathLike, check_fp32, default_out, descendant, open_source, run_stage
from deploy.precision.int8.options import QuantizeOptions, quantize_request
from deploy.progress import Progress, silent
from deploy.runtime.catalog import split_backend

if TYPE_CHECKING:
    from deploy.precision.int8.quantize import Quantized


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What to calibrate on: an ImageFolder, a folder of `.npz` feeds, or in Python feeds (arrays by input name)."""

    calib: Path | None = option(None, "ImageFolder, or a folder of .npz feeds, to calibrate on.", metavar="DIR")
    images: int | None = option(
        None, "Images, drawn evenly over the classes.", metavar="N", default="512, or as many as there are"
    )


@dataclass(frozen=True, kw_only=True)
class CpuFormOptions:
    """Whether to write the form of the graph that ONNX Runtime runs on processors with VNNI."""

    cpu_form: bool = option(True, "Leave out model.cpu.onnx, which ONNX Runtime runs on processors with VNNI.")


@dataclass(frozen=True, kw_only=True)
class GateOptions(MetricOptions):
    """The accuracy gate: a metric before and after, on data with labels (`sqnr` and `cosine` need none)."""

    eval_folder: Path | None = option(
        None, "Compare accuracy before and after on it: see `deploy eval`.", flag="--eval", metavar="DIR|FILE.json"
    )
    max_drop: float | None = option(
        None,
        "Points of the metric that may be lost on the data of --eval; sqnr and cosine have --min-sqnr and --min-cosine instead.",
        metavar="POINTS",
        default="1 of what is in per cent",
    )
    certify: bool = option(False, "Fail too where the 95 % interval of the loss does not show that it is within --max-drop.")
    backend: str | None = option(
        None,
        "Where accuracy is judged.",
        metavar="B",
        default="every backend of the CPU that is installed, and the worst counts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if given := gate_options(vars(self)):
            raise UsageError(f"`{given[0]}` needs `eval_folder`, the images that accuracy is measured on")
        if self.backend is not None:
            named, _ = split_backend(self.backend)
            if named.runs != "onnx" or not named.computes:
                raise UsageError(f"accuracy cannot be judged on {self.backend}: name a backend that runs ONNX files")

    def gate(self, tolerance: Tolerance = TOLERANCES["int8"]) -> Gate | None:
        """The gate, None where there is nothing to measure on. tolerance: has the limits of `sqnr` and `cosine`."""
        if self.eval_folder is None:
            return None
        metric = MetricOptions(metric=self.metric, ignore_index=self.ignore_index)
        return Gate(
            folder=self.eval_folder,
            max_drop=self.max_drop,
            backend=self.backend,
            metric=metric,
            certify=self.certify,
            tolerance=tolerance,
        )


def gate_options(given: Mapping[str, Any]) -> list[str]:
    """The options of a gate that are given without the data that it needs."""
    if given["eval_folder"] is not None:
        return []
    defaults = {each.name: each.default for each in fields(GateOptions)}
    return [name for name in ("max_drop", "backend", "certify", "metric", "ignore_index") if given[name] != defaults[name]]


def quantize(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]],
    images: int | None = None,
    fp8: bool = False,
    method: str | None = None,
    batch_size: int = 2,
    per_tensor: bool = False,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    float_first: bool = False,
    float_last: bool = False,
    keep_below: float = 10.0,
    min_share: float = 90.0,
    bias_correction: bool = True,
    equalize: bool | None = None,
    fp16: bool = False,
    cpu_form: bool = True,
    eval_folder: PathLike | None = None,
    metric: str = "top1",
    ignore_index: int = IGNORE,
    max_drop: float | None = None,
    certify: bool = False,
    backend: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    min_cosine: float | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Turn an FP32 ONNX artifact into INT8, or FP8, with explicit Q/DQ; `out` is `build/<name>-int8` (`-fp8`) by default.

    `calib`: an ImageFolder, a folder of `.npz` feeds, or feeds (arrays by input name). `fp16`: what is not quantized is FP16
    (`build/<name>-int8-fp16`). `cpu_form`: of INT8, also write `model.cpu.onnx`, which ONNX Runtime runs on processors with VNNI; where it
    is too far off it is left out, and the manifest says why. What the other options mean: `QuantizeOptions`. With `eval_folder`,
    `metric` is compared before and after on it (see `deploy.evaluate`), on `backend`, or on every backend of the CPU that is installed,
    and more than `max_drop` points (default 1) lost is an AccuracyError; with `certify` so is a loss whose 95 % interval reaches
    beyond that. The limits of parity: `deploy.evidence.parity.Tolerance`. Raises a DeployError; nothing that stood at `out` is lost
    then.
    """
    given = dict(locals())
    options = collect(QuantizeOptions, given)
    if fp8 and not cpu_form:
        raise UsageError("`cpu_form` is of INT8 alone: with `fp8` there is none to leave out")
    tolerance = collect(ToleranceOptions, given).tolerance(options.precision)
    gate = collect(GateOptions, given).gate(tolerance)
    source = open_source(artifact)
    check_fp32(source)
    data = calibration_set(source, calib, images)
    suffixes = [options.precision] + ["fp16"] * fp16
    target = default_out(out, source, *suffixes)
    return quantize_artifact(source, target, data, options, gate, tolerance, progress, cpu_form=cpu_form and not fp8)


def quantize_artifact(
    artifact: Artifact,
    out: Path,
    data: CalibrationSet,
    options: QuantizeOptions,
    gate: Gate | None = None,
    tolerance: Tolerance | None = None,
    progress: Progress = silent,
    *,
    cpu_form: bool = True,
) -> Artifact:
    """Write `artifact` in INT8, or FP8, to `out`, unless it is there already.

    With `gate`, accuracy before and after goes into the manifest, and a loss of more than it allows is an error. Raises
    UsageError when `artifact` is no FP32 ONNX artifact, or cannot be judged by `gate`, ArtifactError when it is damaged,
    PrecisionError for a graph that cannot be quantized or makes numbers that are not finite, ParityError, AccuracyError
    (nothing is written), DataError, BackendError (ONNX Runtime is not installed) and OutputError.
    """
    tolerance = tolerance or TOLERANCES[options.precision]
    return run_stage(QuantizeStage(artifact, data, options, tolerance, gate, progress, cpu_form=cpu_form), out, artifact)


class QuantizeStage:
    """See `quantize_artifact`."""

    name = "quantize"

    def __init__(
        self,
        source: Artifact,
        data: CalibrationSet,
        options: QuantizeOptions,
        tolerance: Tolerance,
        gate: Gate | None,
        progress: Progress,
        *,
        cpu_form: bool,
    ) -> None:
        self._source = source
        self._data = data
        self._options = options
        self._tolerance = tolerance
        self._gate = gate
        self._progress = progress
        self._cpu_form = cpu_form
        self._request: dict[str, Any] | None = None

    def request(self) -> dict[str, Any] | None:
        check_fp32(self._source)
        if self._gate is not None:
            self._gate.check(self._source)
        self._source.verify(weights=False)
        request = quantize_request(self._source, self._data, self._options)
        if request is None:
            return None
        tolerance = msgspec.to_builtins(self._tolerance)
        gate = self._gate.request(self._source) if self._gate else None
        whole = {**request, "tolerance": tolerance, "gate": gate, "cpu_form": self._cpu_form}
        self._request = {name: value for name, value in whole.items() if name != "parent"}  # known by its content instead
        return whole

    def make(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        request = self._request
        if request is not None and (kept := QUANTIZED_CACHE.fill(writer, self._source, request, stage)) is not None:
            return kept
        manifest = self._quantize(writer, stage)
        if request is not None:
            QUANTIZED_CACHE.put(self._source, request, writer.describe(manifest))
        return manifest

    def _quantize(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        from deploy.precision.int8.quantize import quantize_onnx  # loads onnx and ONNX Runtime

        # First: a metric that fails is to be known before the work.
        reference = Reference(self._source, self._gate, self._progress) if self._gate is not None else None
        make = partial(quantize_onnx, self._source, self._data, self._options, self._progress, cpu=self._cpu_form)
        return self.write(writer, stage, make, reference)

    def write(
        self, writer: ArtifactWriter, stage: Stage, make: "Callable[[], Quantized]", reference: Reference | None = None
    ) -> Manifest:
        """Write what `make` returns, compare it with the source, and judge it against `reference`.

        Raises ParityError and AccuracyError where it is too far off.
        """
        from deploy.pipeline.cpu_form import prove_and_judge, save_cpu_form  # these load onnx and ONNX Runtime
        from deploy.pipeline.written import check_unrounded, prove, source_cases
        from deploy.precision.int8.quantize import hint

        source, progress = self._source, self._progress
        quantized = make()
        quantized.save(writer.path / ONNX)
        manifest = descendant(
            source,
            writer.out,
            stage,
            precision=self._options.precision,
            parity=None,
            calibration=quantized.calibration,
            exclusions=quantized.exclusions,
        )
        feeds = calibration_feeds(source, self._data, quantized.feeds, quantized.expected)
        stored, form = quantized.stored, quantized.cpu
        del quantized  # its weights are as large as the file
        written, cases = writer.describe(manifest), source_cases(source, feeds)
        check_unrounded(written, stored, cases, progress)
        if form is not None:  # `written` does not list its file: what follows is about the signed one
            manifest = save_cpu_form(writer, manifest, form, cases, progress)
        del stored, form
        remedy = hint(manifest.calibration)
        parity = prove(
            written,
            cases,
            self._tolerance,
            against=source.manifest.digest,
            emulated=self._options.fp16,
            remedy=remedy,
            progress=progress,
        )
        manifest = msgspec.structs.replace(manifest, parity=parity)
        if reference is not None:
            proven = msgspec.structs.replace(manifest, files=written.manifest.files)
            accuracies = reference.check(Artifact(written.path, proven), remedy)
            manifest = msgspec.structs.replace(manifest, accuracy=accuracies[0], accuracies=accuracies)
        if self._cpu_form and manifest.cpu_form is None:
            manifest = prove_and_judge(writer, manifest, cases, self._tolerance, source, reference, progress)
        return manifest
