"""`deploy convert`."""

from pathlib import Path

import click

from deploy.artifact.summary import summary
from deploy.cli.common import PATH, debug_option, fp32, open_or_newest, output_option, progress_bar
from deploy.errors import UsageError


@click.command("convert")
@click.argument("artifact", required=False)
@click.option("--fp16", is_flag=True, help="Half precision: 5 bits of exponent, 10 of mantissa.")
@click.option("--bf16", is_flag=True, help="bfloat16: the range of FP32, 7 bits of mantissa.")
@click.option("--fp16-io", is_flag=True, help="Inputs and outputs in FP16 too.")
@click.option("--data", type=PATH, metavar="IMAGEFOLDER", help="Real images for activation ranges and parity.")
@output_option("build/<name>-<precision>")
@debug_option
def command(artifact: str | None, fp16: bool, bf16: bool, fp16_io: bool, data: Path | None, out: Path | None) -> None:
    """Turn an FP32 ONNX artifact (the newest under build/ by default) into half precision.

    Nodes whose weights or activations FP16 cannot hold stay in FP32 and are listed.
    """
    from deploy.pipeline.convert import convert  # loads heavy libraries

    if fp16 == bf16:
        raise UsageError("say which precision: one of --fp16 and --bf16")
    source = open_or_newest(artifact, "FP32 ONNX artifact", fp32)
    with progress_bar() as progress:
        made = convert(source, out, precision="fp16" if fp16 else "bf16", fp16_io=fp16_io, data=data, progress=progress)
    click.echo(summary(made))
