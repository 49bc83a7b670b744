"""`deploy tune`."""

import json
from pathlib import Path
from typing import Any

import click

from deploy.cli.common import (
    debug_option,
    device_option,
    fp32,
    json_option,
    open_or_newest,
    output_option,
    progress_bar,
    threads_option,
)
from deploy.cli.options import PATH, options
from deploy.errors import UsageError
from deploy.pipeline.quantize import CalibrationOptions
from deploy.precision.int8.options import QuantizeOptions
from deploy.tune.options import TuneOptions

SCHEMA = 2
NOT_HERE = ("fp8", "fp16", "keep_below", "min_share")
"""Options of `quantize` that follow from the backend, or say how much of a mix must be which: that is what is searched."""


@click.command("tune")
@click.argument("artifact", required=False)
@options(CalibrationOptions, TuneOptions)
@options(QuantizeOptions, leave_out=NOT_HERE)
@device_option
@threads_option
@click.option("--report", type=PATH, metavar="FILE.html", help="Write a page with every mix and every unit.")
@output_option("build/<name>-tuned")
@json_option
@debug_option
def command(
    artifact: str | None,
    calib: Path | None,
    eval_folder: Path | None,
    report: Path | None,
    out: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Find the fastest mix of INT8 and floating point of an FP32 ONNX artifact (the newest under build/ by default) within --max-drop.

    Each unit of layers is timed in INT8 on the backend that the artifact is for, and its damage measured. Mixes of several budgets are
    solved for, built, timed beside floating point, and tested, the safest first, until one is not shown to keep within the limit. The
    fastest mix that passed becomes the artifact; where none is faster than floating point, the artifact stays in floating point, and the
    output says why. On TensorRT mixes are engines of INT8, or FP8, and FP16.
    """
    if calib is None:
        raise UsageError("say which images to calibrate on: --calib IMAGEFOLDER")
    if eval_folder is None:
        raise UsageError("say which images the loss is measured on: --eval IMAGEFOLDER")
    source = open_or_newest(artifact, "FP32 ONNX artifact", fp32)
    from deploy.tune.tune import tune

    with progress_bar() as progress:
        made = tune(source, out, calib=calib, eval_folder=eval_folder, progress=progress, **given)
    from deploy.tune.page import page
    from deploy.tune.text import text

    if report is not None:
        page(made, report)
    if as_json:
        import msgspec

        document = {"schema": SCHEMA, "artifact": made.shown, **msgspec.to_builtins(made.manifest.tuning)}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        click.echo(text(made))
    if made.manifest.tuning is not None and made.manifest.tuning.stopped == "interrupted":
        raise KeyboardInterrupt  # after what was found has been written
