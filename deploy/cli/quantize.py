"""`deploy quantize`, and its options, which `deploy build-trt --int8` takes too."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deploy.artifact.summary import summary
from deploy.cli.common import PATH, debug_option, fp32, open_or_newest, output_option, progress_bar
from deploy.errors import UsageError

_OPTIONS = (
    click.option("--calib", type=PATH, metavar="DIR", help="ImageFolder, or a folder of .npz feeds, to calibrate on."),
    click.option(
        "--method", default="percentile", show_default=True, metavar="M", help="Scales by max, percentile, mse or entropy."
    ),
    click.option(
        "--images", type=int, metavar="N", help="Images, drawn evenly over the classes.  [default: 512, or all there are]"
    ),
    click.option("--batch-size", type=int, default=2, show_default=True, metavar="B", help="Does not change the scales."),
    click.option("--per-tensor", is_flag=True, help="One scale for a weight, not one for each output channel."),
    click.option(
        "--exclude", multiple=True, metavar="NODE", help="Not in INT8: a node, an operator or a pattern. May be repeated."
    ),
    click.option("--float-first", is_flag=True, help="The first layer is not in INT8."),
    click.option("--float-last", is_flag=True, help="The last layer is not in INT8."),
    click.option("--no-bias-correction", is_flag=True, help="Leave the mean error of each layer in."),
    click.option(
        "--equalize/--no-equalize",
        default=None,
        help="Equalize ranges across layers first.  [default: with --per-tensor or depthwise layers]",
    ),
    click.option("--eval", "eval_folder", type=PATH, metavar="IMAGEFOLDER", help="Compare accuracy before and after on it."),
    click.option("--max-drop", type=float, metavar="POINTS", help="Top-1 points that may be lost on --eval.  [default: 1]"),
)


def quantize_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of quantization; the command gets those of `QuantizeOptions` as one argument, `quantization`."""

    @functools.wraps(command)
    def collected(
        *,
        method: str,
        batch_size: int,
        per_tensor: bool,
        exclude: tuple[str, ...],
        float_first: bool,
        float_last: bool,
        no_bias_correction: bool,
        equalize: bool | None,
        **others: Any,
    ) -> Any:
        quantization = {
            "method": method,
            "batch_size": batch_size,
            "per_tensor": per_tensor,
            "exclude": exclude,
            "float_first": float_first,
            "float_last": float_last,
            "bias_correction": not no_bias_correction,
            "equalize": equalize,
        }
        return command(quantization=quantization, **others)

    for option in reversed(_OPTIONS):
        collected = option(collected)
    return collected


@click.command("quantize")
@click.argument("artifact", required=False)
@quantize_options
@click.option("--fp16", is_flag=True, help="FP16 for what is not INT8, and for the scales.")
@output_option("build/<name>-int8")
@debug_option
def command(
    artifact: str | None,
    calib: Path | None,
    images: int | None,
    quantization: dict[str, Any],
    eval_folder: Path | None,
    max_drop: float | None,
    fp16: bool,
    out: Path | None,
) -> None:
    """Turn an FP32 ONNX artifact (the newest under build/ by default) into INT8 with Q/DQ pairs.

    The same file runs on TensorRT, TensorRT-RTX, ONNX Runtime and OpenVINO.
    """
    from deploy.pipeline.quantize import quantize  # loads heavy libraries

    if calib is None:
        raise UsageError("say which images to calibrate on: --calib IMAGEFOLDER")
    source = open_or_newest(artifact, "FP32 ONNX artifact", fp32)
    with progress_bar() as progress:
        made = quantize(
            source,
            out,
            calib=calib,
            images=images,
            fp16=fp16,
            eval_folder=eval_folder,
            max_drop=max_drop,
            progress=progress,
            **quantization,
        )
    click.echo(summary(made))
