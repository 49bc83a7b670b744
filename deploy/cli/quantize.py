"""`deploy quantize`."""

from pathlib import Path
from typing import Any

import click

from deploy.artifact.summary import summary
from deploy.cli.common import debug_option, fp32, open_or_newest, output_option, progress_bar
from deploy.cli.options import options
from deploy.errors import UsageError
from deploy.evidence.options import ToleranceOptions
from deploy.pipeline.quantize import CalibrationOptions, CpuFormOptions, GateOptions, quantize
from deploy.precision.int8.options import QuantizeOptions


@click.command("quantize")
@click.argument("artifact", required=False)
@options(CalibrationOptions, QuantizeOptions, CpuFormOptions, GateOptions, ToleranceOptions)
@output_option("build/<name>-<int8|fp8>[-fp16]")
@debug_option
def command(artifact: str | None, calib: Path | None, out: Path | None, **given: Any) -> None:
    """Turn an FP32 ONNX artifact (the newest under build/ by default) into INT8, or FP8, with Q/DQ pairs.

    The same file runs on TensorRT, TensorRT-RTX, ONNX Runtime and OpenVINO; in INT8, a second one is for ONNX Runtime on processors
    with VNNI.
    """
    if calib is None:
        raise UsageError("say which images to calibrate on: --calib IMAGEFOLDER")
    source = open_or_newest(artifact, "FP32 ONNX artifact", fp32)
    with progress_bar() as progress:
        made = quantize(source, out, calib=calib, progress=progress, **given)
    click.echo(summary(made))
