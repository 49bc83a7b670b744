"""The stage `convert`: an FP32 ONNX artifact in half precision, with the evidence that it still computes the same."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX, Manifest, Stage
from deploy.artifact.writer import ArtifactWriter
from deploy.data.image_folder import data_digest
from deploy.data.images import image_input
from deploy.host.versions import tool_versions
from deploy.options import collect
from deploy.pipeline.stage import PathLike, check_fp32, default_out, descendant, open_source, run_stage
from deploy.precision.formats import FORMATS, IMAGES, ConvertOptions, ConvertPrecision
from deploy.progress import Progress, silent

if TYPE_CHECKING:
    from deploy.precision.converted import Converted


def convert(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    precision: ConvertPrecision,
    fp16_io: bool = False,
    data: PathLike | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Convert an FP32 ONNX artifact to half precision, checked against it; `out` is `build/<name>-<precision>` by default.

    Inputs and outputs stay FP32 unless `fp16_io`. `data` is an ImageFolder for activation ranges and parity. Raises a
    DeployError; nothing that stood at `out` is lost then.
    """
    options = collect(ConvertOptions, locals())
    source = open_source(artifact)
    return convert_artifact(source, default_out(out, source, precision), options, progress)


def convert_artifact(artifact: Artifact, out: Path, options: ConvertOptions, progress: Progress = silent) -> Artifact:
    """Write `artifact` in half precision to `out`, unless it is there already.

    Raises UsageError when `artifact` is no FP32 ONNX artifact or `out` is the artifact itself, ArtifactError when it is
    damaged, PrecisionError, ParityError (the result is too far off; nothing is written), DataError, BackendError (ONNX
    Runtime is not installed) and OutputError.
    """
    return run_stage(_Convert(artifact, options, progress), out, artifact)


class _Convert:
    name = "convert"

    def __init__(self, source: Artifact, options: ConvertOptions, progress: Progress) -> None:
        self._source = source
        self._options = options
        self._progress = progress

    def request(self) -> dict[str, Any]:
        source, options = self._source, self._options
        check_fp32(source)
        if options.data is not None:
            image_input(source)
        source.verify(weights=False)
        return {
            "parent": source.manifest.digest,
            "precision": options.precision,
            "fp16_io": options.fp16_io,
            "data": data_digest(options.data, IMAGES) if options.data is not None else None,
            "profile": msgspec.to_builtins(options.profile),
            "tolerance": msgspec.to_builtins(options.tolerance()),
            "tools": tool_versions(),
        }

    def make(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        module = importlib.import_module(FORMATS[self._options.precision].module)  # loads onnx and ONNX Runtime
        converted: Converted = module.convert_onnx(self._source, self._options, self._progress)
        converted.save(writer.path / ONNX)
        return descendant(
            self._source,
            writer.out,
            stage,
            precision=self._options.precision,
            inputs=converted.inputs,
            outputs=converted.outputs,
            parity=converted.parity,
            exclusions=converted.exclusions,
        )
