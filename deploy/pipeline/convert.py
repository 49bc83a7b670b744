"""The stage `convert`: an FP32 ONNX artifact in half precision, with the evidence that it still computes the same."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import onnx
import onnx_ir

from deploy.artifact.artifact import Artifact, parent_record, standing
from deploy.artifact.manifest import ONNX, Exclusion, Stage, request_digest
from deploy.artifact.onnxfile import graph_specs, save_model
from deploy.artifact.tensors import Feed, Profile, TensorSpec, batch_dim, example_dims, random_feeds, row_count
from deploy.artifact.writer import ArtifactWriter, check_output
from deploy.data.image_folder import data_digest, image_feeds
from deploy.data.images import image_input
from deploy.errors import ParityError, PrecisionError, UsageError
from deploy.evidence.parity import PARITY_BATCHES, TOLERANCES, Parity, Tolerance, compare
from deploy.host.versions import tool_versions
from deploy.pipeline.stage import PathLike, as_path, default_out, open_source
from deploy.precision.cpu import ONNXRUNTIME_VERSION, CpuGraph
from deploy.precision.graph import prepare
from deploy.precision.half.convert import to_half
from deploy.precision.half.emulate import emulate
from deploy.precision.half.keep import nodes_to_keep
from deploy.precision.half.plan import HALF, OPSET, HalfPrecision
from deploy.precision.ranges import Range, activation_ranges
from deploy.progress import Progress, silent

logger = logging.getLogger(__name__)

IMAGES = 128
"""Images of `data` that activation ranges are read from, drawn evenly over the classes."""

_IMAGE_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How to convert.

    fp16_io: inputs and outputs in FP16 too; with `fp16` only, for numpy has no bfloat16.
    data: an ImageFolder whose images give activation ranges and parity, beside random input.
    profile: sizes of symbolic dimensions for random input are those of its optimum; None: the manifest's first profile.
    rtol, atol: the tolerance of parity; None: `TOLERANCES` of the precision.
    """

    precision: HalfPrecision
    fp16_io: bool = False
    data: Path | None = None
    profile: Profile | None = None
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in HALF:
            raise UsageError(f"precision must be fp16 or bf16, not {self.precision!r}")
        if self.fp16_io and self.precision != "fp16":
            raise UsageError("--fp16-io goes with --fp16: inputs and outputs in BF16 are not supported")
        self.tolerance()  # raises now, not after the conversion

    def tolerance(self) -> Tolerance:
        default = TOLERANCES[self.precision]
        return Tolerance(
            rtol=default.rtol if self.rtol is None else self.rtol, atol=default.atol if self.atol is None else self.atol
        )


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A graph in half precision, its inputs and outputs, the nodes left in FP32 and its parity with the FP32 graph."""

    model: onnx.ModelProto
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    exclusions: list[Exclusion]
    parity: Parity

    def save(self, path: Path) -> None:
        """Write the ONNX file, with the weights beside it where they exceed 2 GB. Raises OSError."""
        save_model(onnx_ir.from_proto(self.model), path)


def convert_artifact(artifact: Artifact, out: Path, options: ConvertOptions, progress: Progress = silent) -> Artifact:
    """Write `artifact` in half precision to `out`, or find that it stands there already.

    Raises UsageError when `artifact` is no FP32 ONNX artifact or `out` is the artifact itself, ArtifactError when it is
    damaged, PrecisionError, ParityError (the result is too far off; nothing is written), DataError, BackendError (ONNX
    Runtime is not installed) and OutputError.
    """
    check_output(out, artifact)
    out = Path(os.path.abspath(out))
    _check_source(artifact, options)
    artifact.verify(weights=False)
    stage = _stage(artifact, options)
    if (stood := standing(out, stage)) is not None:
        logger.info("%s is up to date", out)
        return stood
    converted = convert_onnx(artifact, options, progress)
    with ArtifactWriter(out) as writer:
        converted.save(writer.path / ONNX)
        return writer.commit(
            msgspec.structs.replace(
                artifact.manifest,
                name=out.name,
                precision=options.precision,
                parent=parent_record(artifact, out),
                files={},
                inputs=converted.inputs,
                outputs=converted.outputs,
                parity=converted.parity,
                accuracy=None,
                exclusions=converted.exclusions,
                tools=tool_versions(),
                stage=stage,
            )
        )


def convert_onnx(artifact: Artifact, options: ConvertOptions, progress: Progress = silent) -> Converted:
    """Convert the graph of `artifact` in memory and compare it with the FP32 graph.

    Activation ranges are seen on random input at the batch sizes of `PARITY_BATCHES` and on `IMAGES` images of
    `options.data`; parity is checked on the same random input and on images at the same batch sizes, the half-precision
    graph emulated in FP32. Raises as `convert_artifact` does.
    """
    _check_source(artifact, options)
    artifact.verify(weights=False)
    model = onnx.load(artifact.onnx_path)
    try:
        prepared = prepare(model, opset=OPSET[options.precision])
        ranges = activation_ranges(prepared, _range_feeds(artifact, options, progress))
    except PrecisionError as error:
        raise PrecisionError(f"cannot convert {artifact.shown}: {error}") from error
    _check_finite(prepared, ranges, artifact)
    progress(f"converting to {options.precision.upper()}")
    keep = nodes_to_keep(prepared, ranges, options.precision)
    half, exclusions = to_half(prepared, options.precision, half_io=options.fp16_io, keep=keep)
    parity = _parity(artifact, model, half, options, progress)
    inputs, outputs = graph_specs(half.graph)
    return Converted(
        model=half,
        inputs=_with_dtypes(artifact.manifest.inputs, inputs),
        outputs=_with_dtypes(artifact.manifest.outputs, outputs),
        exclusions=exclusions,
        parity=parity,
    )


def _check_source(artifact: Artifact, options: ConvertOptions) -> None:
    manifest = artifact.manifest
    if manifest.kind != "onnx":
        raise UsageError(f"{artifact.location} is an engine; give the ONNX artifact it was built from")
    if manifest.precision != "fp32":
        raise UsageError(f"{artifact.location} is {manifest.precision} already; give the FP32 artifact it was made from")
    if options.data is not None:
        image_input(artifact)


def _range_feeds(artifact: Artifact, options: ConvertOptions, progress: Progress) -> Iterator[Feed]:
    feeds = _random_feeds(artifact, options)
    total = len(feeds) + (0 if options.data is None else -(-IMAGES // _IMAGE_BATCH))
    done = 0
    for feed in feeds:
        progress("reading activation ranges", done, total)
        yield feed
        done += 1
    if options.data is not None:
        for feed in image_feeds(artifact, options.data, batch_size=_IMAGE_BATCH, count=IMAGES):
            progress("reading activation ranges", done, max(total, done + 1))
            yield feed
            done += 1


def _random_feeds(artifact: Artifact, options: ConvertOptions) -> list[Feed]:
    """Random feeds at `PARITY_BATCHES`; as many, of other seeds, where the batch is fixed."""
    specs = artifact.manifest.inputs
    batch = batch_dim(specs)
    dims = example_dims(specs, batch)
    profile = options.profile or next(iter(artifact.manifest.profiles), {})
    for spec in specs:
        if spec.name in profile:
            dims |= {dim: size for dim, size in zip(spec.shape, profile[spec.name].opt, strict=True) if isinstance(dim, str)}
    return random_feeds(specs, dims)


def _parity_feeds(artifact: Artifact, options: ConvertOptions) -> Iterator[tuple[str, Feed]]:
    for feed in _random_feeds(artifact, options):
        yield "random", feed
    if options.data is not None:
        seen: set[int] = set()  # batches may be of one fixed size
        for size in PARITY_BATCHES:
            feed = next(image_feeds(artifact, options.data, batch_size=size, count=size))
            if (found := len(next(iter(feed.values())))) not in seen:
                seen.add(found)
                yield "images", feed


def _check_finite(model: onnx.ModelProto, ranges: Mapping[str, Range], artifact: Artifact) -> None:
    """Raise PrecisionError when an output is not finite in FP32: nothing could then be compared."""
    broken = [output.name for output in model.graph.output if output.name in ranges and not ranges[output.name].finite]
    if broken:
        node = next(
            node for node in model.graph.node for name in node.output if name in ranges and not ranges[name].finite
        )  # fmt: skip
        raise PrecisionError(
            f"{artifact.location} gives NaN or infinity in output {broken[0]!r} in FP32 already, first in node {node.name!r}"
            f" ({node.op_type}); check the weights and that the input is what the model takes"
        )


def _parity(
    artifact: Artifact, model: onnx.ModelProto, half: onnx.ModelProto, options: ConvertOptions, progress: Progress
) -> Parity:
    reference, emulated = CpuGraph(model), CpuGraph(emulate(half))
    cases = []
    for data, feed in _parity_feeds(artifact, options):
        batch = row_count(feed)
        progress(f"comparing with FP32 on {data} input, batch {batch}")
        try:
            case = compare(
                emulated(feed),
                reference(feed),
                options.tolerance(),
                data=data,
                batch=batch,
                what=f"{artifact.location} in {options.precision.upper()}",
            )
        except ParityError as error:
            other = "--bf16, which has the range of FP32" if options.precision == "fp16" else "--fp16, which is finer"
            raise ParityError(f"{error}; nothing was written: try {other}") from error
        cases.append(case)
    return Parity(
        against=artifact.manifest.digest,
        by=f"emulation on onnxruntime {ONNXRUNTIME_VERSION}",
        tolerance=options.tolerance(),
        cases=cases,
    )


def _with_dtypes(specs: list[TensorSpec], found: list[TensorSpec]) -> list[TensorSpec]:
    """`specs` with the dtypes of `found`; names and symbolic dimensions stay as the user knows them."""
    assert [spec.name for spec in specs] == [spec.name for spec in found]
    return [dataclasses.replace(spec, dtype=other.dtype) for spec, other in zip(specs, found, strict=True)]


def _stage(artifact: Artifact, options: ConvertOptions) -> Stage:
    """Everything that the artifact depends on, as a digest."""
    request: dict[str, Any] = {
        "parent": artifact.manifest.digest,
        "precision": options.precision,
        "fp16_io": options.fp16_io,
        "data": data_digest(options.data, IMAGES) if options.data is not None else None,
        "profile": msgspec.to_builtins(options.profile),
        "tolerance": msgspec.to_builtins(options.tolerance()),
        "tools": tool_versions(),
    }
    return Stage(name="convert", request=request_digest(request))


def convert(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    precision: Literal["fp16", "bf16"],
    fp16_io: bool = False,
    data: PathLike | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Convert an FP32 ONNX artifact to half precision, checked against it; `out` is `build/<name>-<precision>` by default.

    Inputs and outputs stay FP32 unless `fp16_io`. `data` is an ImageFolder for activation ranges and parity. Raises a
    DeployError; nothing that stood at `out` is lost then.
    """
    source = open_source(artifact)
    options = ConvertOptions(precision=precision, fp16_io=fp16_io, data=as_path(data))
    return convert_artifact(source, default_out(out, source, precision), options, progress)
