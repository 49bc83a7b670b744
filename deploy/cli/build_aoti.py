"""`deploy build-aoti`."""

from pathlib import Path
from typing import Any

import click

from deploy.artifact.summary import summary
from deploy.cli.common import debug_option, fp32, open_or_newest, output_option, progress_bar
from deploy.cli.options import options
from deploy.evidence.options import ToleranceOptions
from deploy.pipeline.build_aoti import BuildAotiOptions, build_aoti


@click.command("build-aoti")
@click.argument("artifact", required=False)
@options(BuildAotiOptions, ToleranceOptions)
@output_option("build/<name>[-<precision>]-aoti")
@debug_option
def command(artifact: str | None, out: Path | None, **given: Any) -> None:
    """Compile the module of an export (the newest FP32 artifact under build/ by default) with torch's AOTInductor.

    The package runs where this torch is installed, on this sort of processor or GPU, without the module's code.
    """
    source = open_or_newest(artifact, "FP32 ONNX artifact", fp32)
    with progress_bar() as progress:
        made = build_aoti(source, out, progress=progress, **given)
    click.echo(summary(made))
