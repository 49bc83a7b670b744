"""The stage `build-trt`: an ONNX artifact to an engine artifact, attested."""

import dataclasses
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX, QUANTIZED, Manifest, Stage
from deploy.artifact.tensors import Profile
from deploy.artifact.writer import ArtifactWriter
from deploy.data.calibration_set import CalibrationSet, calibration_set
from deploy.data.evidence_feeds import real_data
from deploy.engine.builder import build_engine, checked
from deploy.engine.cuda import open_device
from deploy.engine.cuda.driver import has_gpu
from deploy.engine.flavour import Flavour, load_flavour
from deploy.engine.options import BuildOptions
from deploy.errors import BackendError, UsageError
from deploy.evaluation.gate import Gate, Reference
from deploy.evaluation.options import IGNORE
from deploy.evidence.options import ToleranceOptions
from deploy.evidence.parity import Tolerance
from deploy.host.versions import tool_versions
from deploy.options import collect
from deploy.pipeline.artifact_cache import ENGINE_CACHE
from deploy.pipeline.build_trt_options import BuildTrtOptions
from deploy.pipeline.convert import warn_made_up
from deploy.pipeline.profiles import make_profiles
from deploy.pipeline.quantize import GateOptions, gate_options
from deploy.pipeline.stage import PathLike, check_engine_source, default_out, fp32_source, open_source, run_stage
from deploy.precision.formats import ConvertOptions
from deploy.precision.half.options import HalfPrecision
from deploy.precision.int8.options import QuantizeOptions, quantize_settings
from deploy.progress import Progress, silent

if TYPE_CHECKING:  # they load onnx
    from deploy.pipeline.preflight import Preflight
    from deploy.pipeline.typed import Typed

logger = logging.getLogger(__name__)


def build_trt(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    precision: HalfPrecision | None = None,
    fp16_io: bool = False,
    data: PathLike | None = None,
    int8: bool = False,
    fp8: bool = False,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]] | None = None,
    images: int | None = None,
    eval_folder: PathLike | None = None,
    metric: str = "top1",
    ignore_index: int = IGNORE,
    max_drop: float | None = None,
    certify: bool = False,
    backend: str | None = None,
    quantization: QuantizeOptions | None = None,
    flavour: str = "auto",
    shapes: Sequence[str] = (),
    targets: Sequence[str] = (),
    opt_level: int | None = None,
    tf32: bool = False,
    workspace: int | None = None,
    timing_cache: PathLike | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    strip: bool = False,
    refit_from: PathLike | None = None,
    allow_slower: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
    min_cosine: float | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    cache: bool = True,
    progress: Progress = silent,
) -> Artifact:
    """Build a TensorRT engine artifact; `out` is `build/<name>[-<precision>]-trt` by default.

    `int8` or `fp8` quantizes an FP32 artifact first, as `quantize` does with `calib`, `images`, `eval_folder`, `metric`, `ignore_index`,
    `max_drop`, `certify`, `backend` and the options in `quantization`. What the others mean: `BuildTrtOptions` and
    `deploy.engine.options.BuildOptions`. Raises a
    DeployError; nothing that stood at `out` is lost then.
    """
    given = dict(locals())
    source = open_source(artifact)
    options = _options(given)
    if not options.quantizes and (eval_folder is not None or gate_options(given)):
        raise UsageError("`eval_folder`, and all that is for the accuracy on it, need `int8` or `fp8`")
    calibration = _calibration(source, options, calib, images)
    suffixes = [*filter(None, (options.quantizes, precision)), "trt"]
    gate = collect(GateOptions, given).gate(options.tolerance.tolerance(options.quantizes or "int8"))
    return build_trt_artifact(source, default_out(out, source, *suffixes), options, calibration, gate, progress)


def preflight(
    artifact: Artifact | PathLike,
    *,
    precision: HalfPrecision | None = None,
    fp16_io: bool = False,
    data: PathLike | None = None,
    int8: bool = False,
    fp8: bool = False,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]] | None = None,
    images: int | None = None,
    quantization: QuantizeOptions | None = None,
    flavour: str = "auto",
    shapes: Sequence[str] = (),
    progress: Progress = silent,
) -> "Preflight":
    """Whether TensorRT's parser takes the model as `build_trt` would give it to it; nothing is built, and no GPU is needed.

    The options are those of `build_trt`. Raises EngineError listing every node that is refused, by its ONNX name, with the
    reason and a remedy; and what the conversion raises.
    """
    given = dict(locals())
    source = open_source(artifact)
    options = _options(given)
    return preflight_artifact(source, options, _calibration(source, options, calib, images), progress)


def _options(given: Mapping[str, Any]) -> BuildTrtOptions:
    build = collect(BuildOptions, given)
    quantization = given["quantization"] or QuantizeOptions()
    tolerance = collect(ToleranceOptions, given)
    tolerance.tolerance("fp32")  # raises now what makes no sense
    return collect(BuildTrtOptions, given, build=build, quantization=quantization, tolerance=tolerance)


def _calibration(
    source: Artifact,
    options: BuildTrtOptions,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]] | None,
    images: int | None,
) -> CalibrationSet | None:
    if not options.quantizes and (calib is not None or images is not None):
        raise UsageError("`calib` and `images` need `int8` or `fp8`")
    return None if calib is None or source.manifest.precision in QUANTIZED else calibration_set(source, calib, images)


def build_trt_artifact(
    artifact: Artifact,
    out: Path,
    options: BuildTrtOptions,
    data: CalibrationSet | None = None,
    gate: Gate | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Build the engine artifact `out`, which also holds the typed `model.onnx` that it was built from.

    `data` is what `options.int8` or `options.fp8` calibrates on, `gate` what its accuracy is held to. The share of multiply-accumulates in
    each precision is read back: on a GPU from the engine, which is also compared with its typed ONNX file there, elsewhere
    from the network that the parser made. Under 90 % in the precision asked for, outside the reported exclusions, nothing is
    written, nor where INT8 or FP8 is slower than FP16. Raises EngineError, PrecisionError, ParityError, AccuracyError,
    ArtifactError, OutputError, UsageError and BackendError.
    """
    return run_stage(_BuildTrt(artifact, options, data, gate, progress), out, artifact)


def preflight_artifact(
    artifact: Artifact, options: BuildTrtOptions, data: CalibrationSet | None = None, progress: Progress = silent
) -> "Preflight":
    """Convert as `build_trt_artifact` does and let the parser read the result; nothing is built or written.

    Raises EngineError listing every node that the parser refuses, by its ONNX name, with the reason and a remedy, and when
    the precision asked for is not honoured; and what the conversion raises.
    """
    work = _BuildTrt(artifact, options, data, None, progress)
    work.request()
    return work.preflight()


class _BuildTrt:
    name = "build-trt"

    def __init__(
        self,
        source: Artifact,
        options: BuildTrtOptions,
        data: CalibrationSet | None,
        gate: Gate | None,
        progress: Progress,
    ) -> None:
        self._source = source
        self._options = options
        self._data = data
        self._gate = gate
        self._progress = progress
        self._reference: Artifact | None = None  # what the accuracy is compared with
        self._real: CalibrationSet | None = None  # what is converted on
        self._stripped: Artifact | None = None  # the engine that gets other weights

    def request(self) -> dict[str, Any]:
        self._check_source()
        if self._options.refit_from is None:
            self._flavour = load_flavour(self._options.flavour)
            self._profiles = make_profiles(self._options.shapes, self._source.manifest.inputs, self._source.manifest.profiles)
        else:
            from deploy.pipeline.refit import open_stripped  # loads onnx

            self._stripped, self._flavour = open_stripped(self._options.refit_from)
            self._profiles = self._stripped.manifest.profiles
        fp8 = self._options.fp8 or self._source.manifest.precision == "fp8"
        self._build_options = checked(self._flavour, self._options.build, fp8=fp8)
        self._gpu = gpu_identity()
        gate = self._gate.request(self._source) if self._gate else None
        self._circumstances = {
            **_circumstances(self._options, self._data, self._real, gate, self._flavour, self._profiles, self._gpu),
            "refit_from": self._stripped.manifest.digest if self._stripped else None,
        }
        return {**self._circumstances, "parent": self._source.manifest.digest}

    def _check_source(self) -> None:
        source, options = self._source, self._options
        manifest = source.manifest
        check_engine_source(source)
        if options.precision is not None and manifest.precision != "fp32":
            raise UsageError(
                f"{source.shown} is {manifest.precision} already, and {options.precision} takes an FP32 artifact: leave the"
                " `precision` out to build the file as it is"
            )
        wanted = options.quantizes
        if wanted and manifest.precision not in ("fp32", wanted):
            raise UsageError(f"{source.shown} is {manifest.precision} already, and `{wanted}` takes an FP32 artifact")
        if wanted and manifest.precision == "fp32" and self._data is None:
            raise UsageError(f"`{wanted}` needs images to calibrate on: `calib` IMAGEFOLDER")
        source.verify(weights=False)
        self._real = real_data(source, options.data)
        if self._gate is not None:
            self._reference = fp32_source(source, f"the accuracy of {(wanted or manifest.precision).upper()} is compared with it")
            self._gate.check(self._reference)

    def make(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        timings = self._options.build.timing_cache
        cached = self._options.cache and (timings is None or timings.is_file())  # a copy would not make the file asked for
        if cached and (kept := ENGINE_CACHE.fill(writer, self._source, self._circumstances, stage)) is not None:
            return kept
        manifest = self._build(writer, stage)
        if cached:
            ENGINE_CACHE.put(self._source, self._circumstances, writer.describe(manifest))
        return manifest

    def _build(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        from deploy.pipeline.attest import attested, write_engine  # these load onnx and ONNX Runtime
        from deploy.pipeline.refit import refitted
        from deploy.precision.int8.quantize import hint

        options, progress = self._options, self._progress
        path = writer.path / ONNX
        reference = None
        if self._gate is not None:  # first: a metric that fails is to be known before the work
            assert self._reference is not None
            reference = Reference(self._reference, self._gate, progress)
        typed = self._typed().saved(path)
        made = typed.manifest
        made = msgspec.structs.replace(made, parity=typed.proven(writer.describe(made), self._tolerance(made), progress))
        if reference is not None:
            accuracies = reference.check(writer.describe(made), hint(made.calibration))
            made = msgspec.structs.replace(made, accuracy=accuracies[0], accuracies=accuracies)
        if self._stripped is not None:
            built = refitted(self._stripped, path, self._flavour, self._source.shown)
        else:
            built = build_engine(self._flavour, path, self._profiles, self._build_options, progress, shown=self._source.shown)
        manifest = write_engine(writer, made, self._source, built, self._profiles, self._flavour, stage)
        return attested(
            writer.describe(manifest),
            self._source,
            built,
            self._flavour,
            self._build_options,
            gpu=self._gpu,
            faster_than_fp16=options.quantizes is not None and not options.allow_slower and self._stripped is None,
            tolerance=self._tolerance(manifest),
            progress=progress,
        )

    def _tolerance(self, manifest: Manifest) -> Tolerance:
        return self._options.tolerance.tolerance(manifest.precision)

    def preflight(self) -> "Preflight":
        from deploy.pipeline.preflight import check_parser  # loads onnx

        return check_parser(self._typed(), self._flavour, self._profiles, self._progress)

    def _typed(self) -> "Typed":
        from deploy.pipeline.typed import typed_graph  # loads onnx and ONNX Runtime

        options = self._options
        convert = None
        if options.precision is not None and not options.quantizes:
            if self._real is None:
                warn_made_up(self._source, options.precision)
            convert = ConvertOptions(
                precision=options.precision, fp16_io=options.fp16_io, data=options.data, profile=self._profiles[0]
            )
        return typed_graph(
            self._source,
            self._data or self._real,
            quantize=options.quantize,
            convert=convert,
            profile=self._profiles[0],
            progress=self._progress,
        )


def gpu_identity() -> list[str] | None:
    """Name, compute capability and driver of the GPU that engines are built and tried on; None where there is none."""
    if not has_gpu():
        return None
    try:
        gpu = open_device().gpu()
    except BackendError as error:
        logger.warning("there is an NVIDIA driver, but its GPU cannot be used: %s", error)
        return None
    return [gpu.name, gpu.compute_capability, gpu.driver or "unknown"]


def _circumstances(
    options: BuildTrtOptions,
    data: CalibrationSet | None,
    real: CalibrationSet | None,
    gate: Mapping[str, Any] | None,
    flavour: Flavour,
    profiles: list[Profile],
    gpu: list[str] | None,
) -> dict[str, Any]:
    """Everything but the source that an engine depends on, as JSON-like values."""
    build = {name: value for name, value in dataclasses.asdict(options.build).items() if name != "timing_cache"}
    return {
        "precision": options.precision,
        "fp16_io": options.fp16_io,
        "data": real.digest() if real else None,
        "tolerance": vars(options.tolerance),
        "quantize": quantize_settings(options.quantize) if options.quantize else None,
        "allow_slower": options.allow_slower,
        "calib": (data.digest() or secrets.token_hex()) if data is not None else None,  # read once: never the same again
        "gate": gate,
        "flavour": [flavour.name, flavour.version],
        "gpu": gpu,
        "profiles": msgspec.to_builtins(profiles),
        "build": build,
        "tools": tool_versions(),
    }
