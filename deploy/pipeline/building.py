"""The stage `build-trt`: an ONNX artifact to an engine artifact, attested."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import onnx_ir as ir

from deploy.artifact import ENGINE, ONNX, Artifact, Stage, request_digest, standing
from deploy.engine.attestation import check_honoured, network_share
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import Flavour, load_flavour
from deploy.errors import UsageError
from deploy.macs import count_macs
from deploy.onnxfile import save_model
from deploy.pipeline.conversion import IMAGES, Converted, ConvertOptions, convert_onnx
from deploy.pipeline.lineage import data_digest, parent_record, tool_versions
from deploy.progress import Progress, silent
from deploy.tensors import Profile, ShapeRange, TensorSpec, default_profile, parse_shape
from deploy.writer import ArtifactWriter, check_output

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildTrtOptions:
    """What to build.

    precision: `fp16` or `bf16` converts an FP32 artifact first; None takes the precisions of the file as they are.
    shapes: `NAME=MIN:OPT:MAX` for one optimization profile, each a shape such as `1x3x224x224`; an input left out takes
        the range in the manifest.
    data: an ImageFolder whose images give the activation ranges and parity of the conversion.
    """

    precision: Literal["fp16", "bf16"] | None = None
    fp16_io: bool = False
    data: Path | None = None
    flavour: str = "auto"
    shapes: tuple[str, ...] = ()
    build: BuildOptions = field(default_factory=BuildOptions)

    def __post_init__(self) -> None:
        if self.precision is None and (self.fp16_io or self.data is not None):
            raise UsageError("--fp16-io and --data go with --fp16 or --bf16")


def build_trt_artifact(artifact: Artifact, out: Path, options: BuildTrtOptions, progress: Progress = silent) -> Artifact:
    """Build the engine artifact `out`, which also holds the typed `model.onnx` that it was built from.

    The share of multiply-accumulates in each precision is read back from the network that the parser made; under 90 %
    in the precision asked for, outside the reported exclusions, nothing is written. Raises EngineError, PrecisionError,
    ParityError, ArtifactError, OutputError, UsageError and BackendError.
    """
    check_output(out, artifact)
    manifest = artifact.manifest
    if manifest.kind != "onnx":
        raise UsageError(f"{artifact.location} is an engine already; give the ONNX artifact it was built from")
    if options.precision is not None and manifest.precision != "fp32":
        raise UsageError(
            f"{artifact.location} is {manifest.precision} already; --{options.precision} takes an FP32 artifact. Leave the option out"
            " to build the file as it is"
        )
    artifact.verify(weights=False)
    flavour = load_flavour(options.flavour)
    profiles = _profiles(options.shapes, manifest.inputs, manifest.profiles)
    stage = _stage(artifact, options, flavour, profiles)
    if (stood := standing(out, stage)) is not None:
        logger.info("%s is up to date", out)
        return stood
    converted: Converted | None = None
    if options.precision is not None:
        convert = ConvertOptions(precision=options.precision, fp16_io=options.fp16_io, data=options.data, profile=profiles[0])
        converted = convert_onnx(artifact, convert, progress)
    with ArtifactWriter(out) as writer:
        typed = writer.path / ONNX
        if converted is not None:
            converted.save(typed)
        else:
            save_model(ir.load(artifact.onnx_path), typed)  # external data may have another name there
        built = build_engine(flavour, typed, profiles, options.build, progress)
        macs = count_macs(typed, {name: shapes.opt for name, shapes in profiles[0].items()})
        share, by_node = network_share(built.network, flavour.trt, macs)
        exclusions = converted.exclusions if converted else manifest.exclusions
        precision = options.precision or manifest.precision
        check_honoured(precision, by_node, macs, exclusions, f"{artifact.location} with {flavour.name}")
        (writer.path / ENGINE).write_bytes(built.plan)
        return writer.commit(
            msgspec.structs.replace(
                manifest,
                kind="engine",
                name=out.resolve().name,
                precision=precision,
                parent=parent_record(artifact, out),
                files={},
                inputs=converted.inputs if converted else manifest.inputs,
                outputs=converted.outputs if converted else manifest.outputs,
                profiles=profiles,
                parity=converted.parity if converted else manifest.parity,
                accuracy=None,
                exclusions=list(exclusions),
                tools=tool_versions() | {flavour.name: flavour.version},
                stage=stage,
                target=built.target,
                precision_share=share,
            )
        )


def parse_shapes(text: str) -> tuple[str, ShapeRange]:
    """`"input=1x3x224x224:8x3x224x224:32x3x224x224"` -> name and range; one shape alone stands for all three.

    Raises UsageError.
    """
    name, equals, rest = text.partition("=")
    parts = rest.split(":")
    if not equals or not name or len(parts) not in (1, 3):
        raise UsageError(
            f"cannot read the shapes {text!r}; expected NAME=MIN:OPT:MAX, such as input=1x3x224x224:8x3x224x224:32x3x224x224"
        )
    shapes = [parse_shape(part) for part in parts]
    if any(isinstance(dim, str) for shape in shapes for dim in shape):
        raise UsageError(f"the shapes {text!r} must be numbers")
    low, best, high = [tuple(int(dim) for dim in shape) for shape in (shapes if len(shapes) == 3 else shapes * 3)]
    return name, ShapeRange(min=low, opt=best, max=high)


def _profiles(texts: Sequence[str], inputs: Sequence[TensorSpec], known: Sequence[Profile]) -> list[Profile]:
    """The optimization profiles: those of the manifest, or one with the ranges of `texts`. None for static inputs."""
    asked: dict[str, ShapeRange] = {}
    for text in texts:
        name, shapes = parse_shapes(text)
        if name in asked:
            raise UsageError(f"--shapes names {name!r} twice")
        asked[name] = shapes
    names = [spec.name for spec in inputs]
    if unknown := [name for name in asked if name not in names]:
        raise UsageError(f"--shapes: unknown input {unknown[0]!r}; expected one of {', '.join(names)}")
    if not asked and known:
        return list(known)
    base: Mapping[str, ShapeRange] = known[0] if known else default_profile(inputs) or {}
    profile: Profile = {}
    for spec in inputs:
        known_range = asked.get(spec.name) or base.get(spec.name)
        if known_range is None and spec.dynamic:
            raise UsageError(f"{spec} is dynamic in {', '.join(spec.dynamic)}: say --shapes {spec.name}=MIN:OPT:MAX")
        shapes = known_range or ShapeRange(min=spec.concrete({}), opt=spec.concrete({}), max=spec.concrete({}))
        _check_range(spec, shapes)
        profile[spec.name] = shapes
    return [profile]


def _check_range(spec: TensorSpec, shapes: ShapeRange) -> None:
    if len(shapes.opt) != len(spec.shape):
        raise UsageError(f"--shapes {spec.name}={shapes} has {len(shapes.opt)} dimensions; expected {spec}")
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, int) and {shapes.min[axis], shapes.opt[axis], shapes.max[axis]} != {dim}:
            raise UsageError(f"--shapes {spec.name}={shapes}: dimension {axis} is fixed to {dim} in {spec}")


def _stage(artifact: Artifact, options: BuildTrtOptions, flavour: Flavour, profiles: Sequence[Profile]) -> Stage:
    build = options.build
    request = {
        "parent": artifact.manifest.digest,
        "precision": options.precision,
        "fp16_io": options.fp16_io,
        "data": data_digest(options.data, IMAGES) if options.data else None,
        "flavour": [flavour.name, flavour.version],
        "profiles": msgspec.to_builtins(profiles),
        "opt_level": build.opt_level,
        "tf32": build.tf32,
        "version_compatible": build.version_compatible,
        "hardware_compatible": build.hardware_compatible,
        "tools": tool_versions(),
    }
    return Stage(name="build-trt", request=request_digest(request))
