"""`deploy convert`."""

from pathlib import Path
from typing import Any

import click

from deploy.artifact.summary import summary
from deploy.cli.common import debug_option, fp32, open_or_newest, output_option, progress_bar
from deploy.cli.options import options
from deploy.evidence.options import ToleranceOptions
from deploy.precision.formats import ConvertOptions


@click.command("convert")
@click.argument("artifact", required=False)
@options(ConvertOptions, ToleranceOptions)
@output_option("build/<name>-<precision>")
@debug_option
def command(artifact: str | None, out: Path | None, **given: Any) -> None:
    """Turn an FP32 ONNX artifact (the newest under build/ by default) into half precision.

    Nodes whose weights or activations FP16 cannot hold stay in FP32 and are listed.
    """
    from deploy.pipeline.convert import convert

    source = open_or_newest(artifact, "FP32 ONNX artifact", fp32)
    with progress_bar() as progress:
        made = convert(source, out, progress=progress, **given)
    click.echo(summary(made))
