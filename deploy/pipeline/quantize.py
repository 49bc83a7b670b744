"""The stage `quantize`: an FP32 ONNX artifact as INT8 with explicit Q/DQ, calibrated, corrected and checked."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from deploy.artifact.artifact import Artifact, parent_record, standing
from deploy.artifact.manifest import ONNX, Stage, request_digest
from deploy.artifact.writer import ArtifactWriter, check_output
from deploy.data.calibration_set import CalibrationSet, calibration_set
from deploy.evaluation.gate import Gate, check_accuracy
from deploy.host.versions import tool_versions
from deploy.pipeline.stage import PathLike, check_fp32, default_out, make_gate, open_source
from deploy.precision.int8.options import METHOD, QuantizeOptions, quantize_request
from deploy.precision.int8.quantize import hint, quantize_onnx
from deploy.progress import Progress, silent

logger = logging.getLogger(__name__)


def quantize_artifact(
    artifact: Artifact,
    out: Path,
    data: CalibrationSet,
    options: QuantizeOptions,
    gate: Gate | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Write `artifact` in INT8 to `out`, or find that it stands there already.

    With `gate`, accuracy before and after goes into the manifest, and a loss of more than it allows is an error. Raises
    UsageError when `artifact` is no FP32 ONNX artifact, ArtifactError when it is damaged, PrecisionError for a graph that
    cannot be quantized or makes numbers that are not finite, ParityError, AccuracyError (nothing is written), DataError,
    BackendError (ONNX Runtime is not installed) and OutputError.
    """
    check_output(out, artifact)
    out = Path(os.path.abspath(out))
    check_fp32(artifact)
    artifact.verify(weights=False)
    request = quantize_request(artifact, data, options)
    stage = None
    if request is not None:
        stage = Stage(name="quantize", request=request_digest({**request, "gate": gate.request() if gate else None}))
        if (stood := standing(out, stage)) is not None:
            logger.info("%s is up to date", out)
            return stood
    quantized = quantize_onnx(artifact, data, options, progress)
    with ArtifactWriter(out) as writer:
        quantized.save(writer.path / ONNX)
        made = writer.describe(
            msgspec.structs.replace(
                artifact.manifest,
                name=out.name,
                precision="int8",
                parent=parent_record(artifact, out),
                parity=quantized.parity,
                accuracy=None,
                calibration=quantized.calibration,
                exclusions=quantized.exclusions,
                tools=tool_versions(),
                stage=stage or Stage(name="quantize", request=os.urandom(32).hex()),  # read once: never up to date
            )
        )
        manifest = made.manifest
        if gate is not None:
            accuracy = check_accuracy(artifact, made, gate, hint(quantized.calibration), progress)
            manifest = msgspec.structs.replace(manifest, accuracy=accuracy)
        return writer.commit(manifest)


def quantize(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    calib: PathLike | Iterable[Mapping[str, np.ndarray]],
    method: str = METHOD,
    images: int | None = None,
    batch_size: int = 2,
    per_tensor: bool = False,
    exclude: Sequence[str] = (),
    float_first: bool = False,
    float_last: bool = False,
    bias_correction: bool = True,
    equalize: bool | None = None,
    fp16: bool = False,
    eval_folder: PathLike | None = None,
    max_drop: float | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Turn an FP32 ONNX artifact into INT8 with explicit Q/DQ; `out` is `build/<name>-int8` by default.

    `calib`: an ImageFolder, a folder of `.npz` feeds, or feeds (arrays by input name). `fp16`: what is not INT8 is FP16
    (`build/<name>-int8-fp16`). What the other options mean: `deploy.precision.int8.options.QuantizeOptions`. With `eval_folder`, an ImageFolder, accuracy is compared before and
    after, and more than `max_drop` points (default 1) of top-1 lost is an AccuracyError. Raises a DeployError; nothing
    that stood at `out` is lost then.
    """
    source = open_source(artifact)
    options = QuantizeOptions(
        method=method,
        batch_size=batch_size,
        per_tensor=per_tensor,
        exclude=tuple(exclude),
        float_first=float_first,
        float_last=float_last,
        bias_correction=bias_correction,
        equalize=equalize,
        floats="fp16" if fp16 else "fp32",
    )
    gate = make_gate(eval_folder, max_drop)
    check_fp32(source)
    data = calibration_set(source, calib, images)
    suffixes = ["int8", "fp16"] if fp16 else ["int8"]
    return quantize_artifact(source, default_out(out, source, *suffixes), data, options, gate, progress)
