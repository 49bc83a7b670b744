"""An ONNX graph in half precision."""

from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import load_model
from deploy.data.calibration_set import CalibrationSet
from deploy.data.evidence_feeds import range_feeds
from deploy.precision.converted import Converted, converted
from deploy.precision.formats import ConvertOptions
from deploy.precision.half.options import half_precision
from deploy.precision.half.rewrite import convert_model
from deploy.progress import Progress, silent


def convert_onnx(
    artifact: Artifact, data: CalibrationSet | None, options: ConvertOptions, progress: Progress = silent
) -> Converted:
    """Convert the graph of `artifact`, which is in FP32, in memory.

    Activation ranges are read on `data`, or without it on made-up feeds. Raises PrecisionError, DataError and BackendError
    (ONNX Runtime is not installed).
    """
    precision = half_precision(options.precision)
    model = load_model(artifact.onnx_path)
    exclusions = convert_model(
        model,
        precision,
        range_feeds(artifact, data, options.profile, progress),
        half_io=options.fp16_io,
        shown=artifact.shown,
        progress=progress,
    )
    limits = "other limits: `min_cosine`, `min_sqnr`, `rtol`, `atol`"
    remedy = f"where numbers overflow, try bf16; {limits}" if precision == "fp16" else limits
    return converted(artifact, model, exclusions, remedy)
