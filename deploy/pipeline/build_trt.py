"""The stage `build-trt`: an ONNX artifact to an engine artifact, attested."""

import dataclasses
import logging
import secrets
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
import onnx_ir as ir

from deploy.artifact.artifact import Artifact, parent_record, standing
from deploy.artifact.manifest import ENGINE, ONNX, Manifest, PrecisionShare, Stage, request_digest
from deploy.artifact.onnxfile import save_model
from deploy.artifact.tensors import Profile
from deploy.artifact.writer import ArtifactWriter, check_output
from deploy.data.calibration_set import CalibrationSet, calibration_set
from deploy.data.image_folder import data_digest
from deploy.engine.attestation import check_honoured, network_share
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import Flavour, load_flavour
from deploy.engine.network import parse_network
from deploy.errors import UsageError
from deploy.evaluation.gate import Gate, check_accuracy
from deploy.host.versions import tool_versions
from deploy.pipeline import engine_cache
from deploy.pipeline.attest import attested, gpu_identity, optimum
from deploy.pipeline.convert import IMAGES, ConvertOptions, convert_onnx
from deploy.pipeline.profiles import make_profiles
from deploy.pipeline.stage import PathLike, as_path, default_out, make_gate, open_source
from deploy.precision.int8.quantize import QuantizeOptions, hint, quantize_onnx, quantize_settings
from deploy.precision.macs import count_macs
from deploy.progress import Progress, silent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildTrtOptions:
    """What to build.

    precision: `fp16` or `bf16` converts an FP32 artifact first; None takes the precisions of the file as they are.
    shapes: `NAME=MIN:OPT:MAX`, each a shape such as `1x3x224x224`; an input that is named again begins the next optimization
        profile. An input left out takes the sizes of the symbolic dimensions that it shares with one that is there, and else
        the range in the manifest.
    data: an ImageFolder whose images give the activation ranges and parity of the conversion.
    int8: quantizes an FP32 artifact first, and takes one that is quantized already as it is; with `fp16`, what is not
        INT8 is FP16.
    allow_slower: on a GPU, keep an engine of `int8` that is slower than the same model in FP16.
    cache: take the engine from those kept of earlier builds, where it is the same, and keep it.
    """

    precision: Literal["fp16", "bf16"] | None = None
    int8: QuantizeOptions | None = None
    fp16_io: bool = False
    data: Path | None = None
    flavour: str = "auto"
    shapes: tuple[str, ...] = ()
    allow_slower: bool = False
    cache: bool = True
    build: BuildOptions = field(default_factory=BuildOptions)

    def __post_init__(self) -> None:
        if self.precision is None and (self.fp16_io or self.data is not None):
            raise UsageError("--fp16-io and --data go with --fp16 or --bf16")
        if self.int8 is not None and (self.precision == "bf16" or self.fp16_io or self.data is not None):
            raise UsageError("--int8 goes with --fp16 for the rest, or without; leave out --bf16, --fp16-io and --data")
        if self.allow_slower and self.int8 is None:
            raise UsageError("--allow-slower goes with --int8: it alone is timed against FP16")


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """A graph that the parser takes: the number of its nodes, and the share of its multiply-accumulates in each precision."""

    flavour: str
    version: str
    nodes: int
    share: PrecisionShare


def build_trt_artifact(
    artifact: Artifact,
    out: Path,
    options: BuildTrtOptions,
    data: CalibrationSet | None = None,
    gate: Gate | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Build the engine artifact `out`, which also holds the typed `model.onnx` that it was built from.

    `data` is what `options.int8` calibrates on, `gate` what its accuracy is held to. The share of multiply-accumulates in
    each precision is read back: on a GPU from the engine, which is also compared with its typed ONNX file there, elsewhere
    from the network that the parser made. Under 90 % in the precision asked for, outside the reported exclusions, nothing is
    written, nor where INT8 is slower than FP16. Raises EngineError, PrecisionError, ParityError, AccuracyError,
    ArtifactError, OutputError, UsageError and BackendError.
    """
    check_output(out, artifact)
    _check_source(artifact, options, data)
    flavour = load_flavour(options.flavour)
    profiles = make_profiles(options.shapes, artifact.manifest.inputs, artifact.manifest.profiles)
    gpu = gpu_identity()
    request = _request(options, data, gate, flavour, profiles, gpu)
    stage = Stage(name="build-trt", request=request_digest({**request, "parent": artifact.manifest.digest}))
    if (stood := standing(out, stage)) is not None:
        logger.info("%s is up to date", out)
        return stood
    timings = options.build.timing_cache
    cached = options.cache and (timings is None or timings.is_file())  # a copy would not make the file that was asked for
    if cached and (copied := engine_cache.copy(artifact, request, out, stage)) is not None:
        logger.info("the same engine was built before: copied from %s", engine_cache.folder())
        return copied
    typed = _typed(artifact, options, data, profiles[0], progress)
    with ArtifactWriter(out) as writer:
        path = writer.path / ONNX
        _save(typed, artifact, path)
        made = typed.manifest
        if gate is not None:
            accuracy = check_accuracy(artifact, writer.describe(made), gate, hint(made.calibration), progress)
            made = msgspec.structs.replace(made, accuracy=accuracy)
        built = build_engine(flavour, path, profiles, options.build, progress, shown=artifact.shown)
        (writer.path / ENGINE).write_bytes(built.plan)
        manifest = msgspec.structs.replace(
            made,
            kind="engine",
            name=out.resolve().name,
            parent=parent_record(artifact, out),
            profiles=profiles,
            tools=tool_versions() | {flavour.name: flavour.version},
            stage=stage,
            target=built.target,
        )
        manifest = attested(
            writer.describe(manifest),
            artifact,
            built,
            flavour,
            options.build,
            gpu=gpu,
            faster_than_fp16=options.int8 is not None and not options.allow_slower,
            progress=progress,
        )
        done = writer.commit(manifest)
    if cached:
        engine_cache.put(artifact, request, done)
    return done


def preflight_artifact(
    artifact: Artifact, options: BuildTrtOptions, data: CalibrationSet | None = None, progress: Progress = silent
) -> Preflight:
    """Convert as `build_trt_artifact` does and let the parser read the result; nothing is built or written.

    Raises EngineError listing every node that the parser refuses, by its ONNX name, with the reason and a remedy, and when
    the precision asked for is not honoured; and what the conversion raises.
    """
    _check_source(artifact, options, data)
    flavour = load_flavour(options.flavour)
    profiles = make_profiles(options.shapes, artifact.manifest.inputs, artifact.manifest.profiles)
    typed = _typed(artifact, options, data, profiles[0], progress)
    with tempfile.TemporaryDirectory(prefix="deploy-") as folder:
        path = Path(folder, ONNX)
        _save(typed, artifact, path)
        progress("parsing")
        network = parse_network(flavour, path, shown=artifact.shown)
        macs = count_macs(path, optimum(profiles))
        share, by_node = network_share(network.definition, flavour.trt, macs)
        nodes = len(onnx.load(path, load_external_data=False).graph.node)
    manifest = typed.manifest
    check_honoured(manifest.precision, by_node, macs, manifest.exclusions, f"{artifact.shown} with {flavour.name}")
    return Preflight(flavour=flavour.name, version=flavour.version, nodes=nodes, share=share)


def _check_source(artifact: Artifact, options: BuildTrtOptions, data: CalibrationSet | None) -> None:
    manifest = artifact.manifest
    if manifest.kind != "onnx":
        raise UsageError(f"{artifact.shown} is an engine already; give the ONNX artifact it was built from")
    if options.precision is not None and manifest.precision != "fp32":
        raise UsageError(
            f"{artifact.shown} is {manifest.precision} already; --{options.precision} takes an FP32 artifact. Leave the option out"
            " to build the file as it is"
        )
    if options.int8 is not None and manifest.precision != "int8" and data is None:
        raise UsageError("--int8 needs images to calibrate on: --calib IMAGEFOLDER")
    artifact.verify(weights=False)


def _save(typed: "_Typed", artifact: Artifact, path: Path) -> None:
    # The file is written again even as it is: external data may have another name there.
    save_model(ir.load(artifact.onnx_path) if typed.model is None else ir.from_proto(typed.model), path)


@dataclass(frozen=True, kw_only=True)
class _Typed:
    """The graph that an engine is built from, None for the artifact's own, and what the manifest says of it."""

    model: onnx.ModelProto | None
    manifest: Manifest


def _typed(
    artifact: Artifact, options: BuildTrtOptions, data: CalibrationSet | None, profile: Profile, progress: Progress
) -> _Typed:
    manifest = msgspec.structs.replace(artifact.manifest, files={})
    if options.int8 is not None and manifest.precision == "fp32":
        assert data is not None
        floats = options.precision if options.precision == "fp16" else "fp32"
        quantized = quantize_onnx(artifact, data, dataclasses.replace(options.int8, floats=floats), progress)
        changed = msgspec.structs.replace(
            manifest,
            precision="int8",
            parity=quantized.parity,
            accuracy=None,
            calibration=quantized.calibration,
            exclusions=quantized.exclusions,
        )
        return _Typed(model=quantized.model, manifest=changed)
    if options.precision is not None:
        convert = ConvertOptions(precision=options.precision, fp16_io=options.fp16_io, data=options.data, profile=profile)
        converted = convert_onnx(artifact, convert, progress)
        changed = msgspec.structs.replace(
            manifest,
            precision=options.precision,
            inputs=converted.inputs,
            outputs=converted.outputs,
            parity=converted.parity,
            accuracy=None,
            exclusions=converted.exclusions,
        )
        return _Typed(model=converted.model, manifest=changed)
    return _Typed(model=None, manifest=manifest)


def _request(
    options: BuildTrtOptions,
    data: CalibrationSet | None,
    gate: Gate | None,
    flavour: Flavour,
    profiles: list[Profile],
    gpu: list[str] | None,
) -> dict[str, Any]:
    """Everything but the source that an engine depends on."""
    build = {name: value for name, value in dataclasses.asdict(options.build).items() if name != "timing_cache"}
    return {
        "precision": options.precision,
        "fp16_io": options.fp16_io,
        "data": data_digest(options.data, IMAGES) if options.data else None,
        "int8": quantize_settings(options.int8) if options.int8 else None,
        "allow_slower": options.allow_slower,
        "calib": (data.digest() or secrets.token_hex()) if data is not None else None,  # read once: never the same again
        "gate": gate.request() if gate else None,
        "flavour": [flavour.name, flavour.version],
        "gpu": gpu,
        "profiles": msgspec.to_builtins(profiles),
        "build": build,
        "tools": tool_versions(),
    }


def build_trt(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    precision: Literal["fp16", "bf16"] | None = None,
    fp16_io: bool = False,
    data: PathLike | None = None,
    int8: bool = False,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]] | None = None,
    images: int | None = None,
    eval_folder: PathLike | None = None,
    max_drop: float | None = None,
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
    allow_slower: bool = False,
    cache: bool = True,
    progress: Progress = silent,
) -> Artifact:
    """Build a TensorRT engine artifact; `out` is `build/<name>[-<precision>]-trt` by default.

    `int8` quantizes an FP32 artifact first, as `quantize` does with `calib`, `images`, `eval_folder`, `max_drop` and the
    options in `quantization`. What the others mean: `deploy.pipeline.build_trt.BuildTrtOptions` and
    `deploy.engine.builder.BuildOptions`. Raises a DeployError; nothing that stood at `out` is lost then.
    """
    source = open_source(artifact)
    _check_int8(int8, calib, images, quantization)
    if not int8 and (eval_folder is not None or max_drop is not None):
        raise UsageError("--eval and --max-drop go with --int8")
    options = BuildTrtOptions(
        precision=precision,
        fp16_io=fp16_io,
        data=as_path(data),
        int8=(quantization or QuantizeOptions()) if int8 else None,
        flavour=flavour,
        shapes=tuple(shapes),
        allow_slower=allow_slower,
        cache=cache,
        build=BuildOptions(
            opt_level=opt_level,
            tf32=tf32,
            workspace=workspace,
            targets=tuple(targets),
            timing_cache=as_path(timing_cache),
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
        ),
    )
    data_set = _calibration(source, calib, images)
    suffixes = ["int8"] * int8 + ([precision] if precision else []) + ["trt"]
    return build_trt_artifact(
        source, default_out(out, source, *suffixes), options, data_set, make_gate(eval_folder, max_drop), progress
    )


def preflight(
    artifact: Artifact | PathLike,
    *,
    precision: Literal["fp16", "bf16"] | None = None,
    fp16_io: bool = False,
    data: PathLike | None = None,
    int8: bool = False,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]] | None = None,
    images: int | None = None,
    quantization: QuantizeOptions | None = None,
    flavour: str = "auto",
    shapes: Sequence[str] = (),
    progress: Progress = silent,
) -> Preflight:
    """Whether TensorRT's parser takes the model as `build_trt` would give it to it; nothing is built, and no GPU is needed.

    The options are those of `build_trt`. Raises EngineError listing every node that is refused, by its ONNX name, with the
    reason and a remedy; and what the conversion raises.
    """
    source = open_source(artifact)
    _check_int8(int8, calib, images, quantization)
    options = BuildTrtOptions(
        precision=precision,
        fp16_io=fp16_io,
        data=as_path(data),
        int8=(quantization or QuantizeOptions()) if int8 else None,
        flavour=flavour,
        shapes=tuple(shapes),
    )
    return preflight_artifact(source, options, _calibration(source, calib, images), progress)


def _check_int8(int8: bool, calib: object, images: int | None, quantization: QuantizeOptions | None) -> None:
    if not int8 and (calib is not None or images is not None):
        raise UsageError("--calib and --images go with --int8")
    if not int8 and quantization not in (None, QuantizeOptions()):
        raise UsageError("the options of quantization go with --int8")


def _calibration(
    source: Artifact, calib: PathLike | Iterable[Mapping[str, np.ndarray]] | None, images: int | None
) -> CalibrationSet | None:
    return None if calib is None or source.manifest.precision == "int8" else calibration_set(source, calib, images)
