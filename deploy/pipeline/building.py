"""The stage `build-trt`: an ONNX artifact to an engine artifact, attested."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import onnx
import onnx_ir as ir

from deploy.artifact import ENGINE, ONNX, Artifact, Manifest, Stage, request_digest, standing
from deploy.calibset import CalibrationSet
from deploy.engine.attestation import check_honoured, network_share
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import Flavour, load_flavour
from deploy.errors import UsageError
from deploy.macs import count_macs
from deploy.onnxfile import save_model
from deploy.pipeline.conversion import IMAGES, ConvertOptions, convert_onnx
from deploy.pipeline.gate import Gate, check_accuracy
from deploy.pipeline.lineage import data_digest, parent_record, tool_versions
from deploy.pipeline.profiles import make_profiles
from deploy.pipeline.quantizing import QuantizeOptions, hint, quantize_onnx, quantize_settings
from deploy.progress import Progress, silent
from deploy.tensors import Profile
from deploy.writer import ArtifactWriter, check_output

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildTrtOptions:
    """What to build.

    precision: `fp16` or `bf16` converts an FP32 artifact first; None takes the precisions of the file as they are.
    shapes: `NAME=MIN:OPT:MAX` for one optimization profile, each a shape such as `1x3x224x224`. An input left out takes
        the sizes of the symbolic dimensions that it shares with one that is there, and else the range in the manifest.
    data: an ImageFolder whose images give the activation ranges and parity of the conversion.
    int8: quantizes an FP32 artifact first, and takes one that is quantized already as it is; with `fp16`, what is not
        INT8 is FP16.
    """

    precision: Literal["fp16", "bf16"] | None = None
    int8: QuantizeOptions | None = None
    fp16_io: bool = False
    data: Path | None = None
    flavour: str = "auto"
    shapes: tuple[str, ...] = ()
    build: BuildOptions = field(default_factory=BuildOptions)

    def __post_init__(self) -> None:
        if self.precision is None and (self.fp16_io or self.data is not None):
            raise UsageError("--fp16-io and --data go with --fp16 or --bf16")
        if self.int8 is not None and (self.precision == "bf16" or self.fp16_io or self.data is not None):
            raise UsageError("--int8 goes with --fp16 for the rest, or without; leave out --bf16, --fp16-io and --data")


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
    each precision is read back from the network that the parser made; under 90 % in the precision asked for, outside the
    reported exclusions, nothing is written. Raises EngineError, PrecisionError, ParityError, AccuracyError, ArtifactError,
    OutputError, UsageError and BackendError.
    """
    check_output(out, artifact)
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
    flavour = load_flavour(options.flavour)
    profiles = make_profiles(options.shapes, manifest.inputs, manifest.profiles)
    stage = _stage(artifact, options, data, gate, flavour, profiles)
    if (stood := standing(out, stage)) is not None:
        logger.info("%s is up to date", out)
        return stood
    typed = _typed(artifact, options, data, profiles[0], progress)
    with ArtifactWriter(out) as writer:
        path = writer.path / ONNX
        # The file is written again even as it is: external data may have another name there.
        save_model(ir.load(artifact.onnx_path) if typed.model is None else ir.from_proto(typed.model), path)
        made = typed.manifest
        if gate is not None:
            accuracy = check_accuracy(artifact, writer.describe(made), gate, hint(made.calibration), progress)
            made = msgspec.structs.replace(made, accuracy=accuracy)
        built = build_engine(flavour, path, profiles, options.build, progress, shown=artifact.shown)
        macs = count_macs(path, {name: shapes.opt for name, shapes in profiles[0].items()})
        share, by_node = network_share(built.network.definition, flavour.trt, macs)
        check_honoured(made.precision, by_node, macs, made.exclusions, f"{artifact.shown} with {flavour.name}")
        (writer.path / ENGINE).write_bytes(built.plan)
        return writer.commit(
            msgspec.structs.replace(
                made,
                kind="engine",
                name=out.resolve().name,
                parent=parent_record(artifact, out),
                profiles=profiles,
                tools=tool_versions() | {flavour.name: flavour.version},
                stage=stage,
                target=built.target,
                precision_share=share,
            )
        )


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


def _stage(
    artifact: Artifact,
    options: BuildTrtOptions,
    data: CalibrationSet | None,
    gate: Gate | None,
    flavour: Flavour,
    profiles: Sequence[Profile],
) -> Stage:
    build = options.build
    content = data.digest() if data is not None else None
    request = {
        "parent": artifact.manifest.digest,
        "precision": options.precision,
        "fp16_io": options.fp16_io,
        "data": data_digest(options.data, IMAGES) if options.data else None,
        "int8": quantize_settings(options.int8) if options.int8 else None,
        "calib": content if data is None or content is not None else os.urandom(32).hex(),  # read once: never up to date
        "gate": gate.request() if gate else None,
        "flavour": [flavour.name, flavour.version],
        "profiles": msgspec.to_builtins(profiles),
        "opt_level": build.opt_level,
        "tf32": build.tf32,
        "version_compatible": build.version_compatible,
        "hardware_compatible": build.hardware_compatible,
        "tools": tool_versions(),
    }
    return Stage(name="build-trt", request=request_digest(request))
