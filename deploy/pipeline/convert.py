"""The stage `convert`: an FP32 ONNX artifact in half precision, with the evidence that it still computes the same."""

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX, Manifest, Stage
from deploy.artifact.writer import ArtifactWriter
from deploy.data.calibration_set import CalibrationSet
from deploy.data.evidence_feeds import parity_feeds, real_data
from deploy.evidence.options import ToleranceOptions
from deploy.evidence.parity import TOLERANCES, Tolerance
from deploy.host.versions import tool_versions
from deploy.options import collect
from deploy.pipeline.stage import PathLike, check_fp32, default_out, descendant, open_source, run_stage
from deploy.precision.formats import FORMATS, ConvertOptions, ConvertPrecision
from deploy.progress import Progress, silent

if TYPE_CHECKING:
    from deploy.precision.converted import Converted

logger = logging.getLogger(__name__)


def warn_made_up(source: Artifact, precision: str | None) -> None:
    """Log what made-up feeds leave open about a conversion to half precision."""
    if precision == "fp16":
        logger.warning("the ranges of FP16 come from random numbers alone: give real input with `data`")
    elif precision == "bf16" and (
        unknown := [spec.name for spec in source.manifest.inputs if "int" in spec.dtype and spec.bounds is None]
    ):
        logger.warning(
            "BF16 holds whole numbers up to 256, and %s was tried with 0 to 9 alone: give real input with `data`", unknown[0]
        )


def convert(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    precision: ConvertPrecision,
    fp16_io: bool = False,
    data: PathLike | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    min_cosine: float | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Convert an FP32 ONNX artifact to half precision, checked against it; `out` is `build/<name>-<precision>` by default.

    Inputs and outputs stay FP32 unless `fp16_io`. `data` is an ImageFolder, or a folder of `.npz` feeds, for activation ranges
    and parity. The limits of parity: `deploy.evidence.parity.Tolerance`. Raises a DeployError; nothing that stood at `out` is
    lost then.
    """
    given = dict(locals())
    options = collect(ConvertOptions, given)
    tolerance = collect(ToleranceOptions, given).tolerance(precision)
    source = open_source(artifact)
    return convert_artifact(source, default_out(out, source, precision), options, tolerance, progress)


def convert_artifact(
    artifact: Artifact, out: Path, options: ConvertOptions, tolerance: Tolerance | None = None, progress: Progress = silent
) -> Artifact:
    """Write `artifact` in half precision to `out`, unless it is there already.

    Raises UsageError when `artifact` is no FP32 ONNX artifact or `out` is the artifact itself, ArtifactError when it is
    damaged, PrecisionError, ParityError (the result is too far off; nothing is written), DataError, BackendError (ONNX
    Runtime is not installed) and OutputError.
    """
    return run_stage(_Convert(artifact, options, tolerance or TOLERANCES[options.precision], progress), out, artifact)


class _Convert:
    name = "convert"

    def __init__(self, source: Artifact, options: ConvertOptions, tolerance: Tolerance, progress: Progress) -> None:
        self._source = source
        self._options = options
        self._tolerance = tolerance
        self._progress = progress
        self._data: CalibrationSet | None = None

    def request(self) -> dict[str, Any]:
        source, options = self._source, self._options
        check_fp32(source)
        self._data = real_data(source, options.data)
        source.verify(weights=False)
        return {
            "parent": source.manifest.digest,
            "precision": options.precision,
            "fp16_io": options.fp16_io,
            "data": self._data.digest() if self._data else None,
            "profile": msgspec.to_builtins(options.profile),
            "tolerance": msgspec.to_builtins(self._tolerance),
            "tools": tool_versions(),
        }

    def make(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        from deploy.pipeline.written import prove, source_cases  # these load onnx and ONNX Runtime

        source, options = self._source, self._options
        if self._data is None:
            warn_made_up(source, options.precision)
        cases = source_cases(source, parity_feeds(source, self._data, options.profile))
        converted: Converted = importlib.import_module(FORMATS[options.precision].module).convert_onnx(
            source, self._data, options, self._progress
        )
        converted.save(writer.path / ONNX)
        manifest = descendant(
            source,
            writer.out,
            stage,
            precision=options.precision,
            inputs=converted.inputs,
            outputs=converted.outputs,
            parity=None,
            exclusions=converted.exclusions,
        )
        remedy = converted.remedy
        del converted  # its weights are as large as the file
        parity = prove(
            writer.describe(manifest),
            cases,
            self._tolerance,
            against=source.manifest.digest,
            emulated=True,
            remedy=remedy,
            progress=self._progress,
        )
        return msgspec.structs.replace(manifest, parity=parity)
