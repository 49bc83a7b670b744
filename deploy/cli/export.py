"""`deploy export`."""

from pathlib import Path
from typing import Any

import click

from deploy.artifact.summary import summary
from deploy.cli.common import debug_option, output_option, progress_bar
from deploy.cli.options import options
from deploy.evidence.options import ToleranceOptions
from deploy.pipeline.export_options import ExportOptions


@click.command("export")
@options(ExportOptions, ToleranceOptions)
@output_option("build/<name>")
@debug_option
def command(out: Path | None, **given: Any) -> None:
    """Turn a trained state_dict into an ONNX artifact, with parity against the eager module.

    Without --weights the net is seeded and random, and the manifest says so; nothing is downloaded.
    """
    from deploy.pipeline.export import export  # loads torch

    with progress_bar() as progress:
        artifact = export(out, progress=progress, **given)
    click.echo(summary(artifact))
