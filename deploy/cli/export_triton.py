"""`deploy export-triton`."""

from pathlib import Path

import click

from deploy.cli.common import debug_option
from deploy.cli.options import PATH


@click.command("export-triton")
@click.argument("models", nargs=-1, required=True, metavar="ARTIFACT|NAME=PATH[@VERSION]...")
@click.option("-o", "repository", type=PATH, required=True, metavar="REPO", help="The model repository, new or old.")
@click.option(
    "--instances", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Instances of each model."
)
@click.option("--cpu", is_flag=True, help="Run ONNX models on the processor.")
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows of a batch at most.  [default: what the profile takes, or 32]",
)
@click.option(
    "--delay-us",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    metavar="US",
    help="How long a batch waits for more rows.",
)
@click.option(
    "--keep-versions",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Versions served, the newest ones.",
)
@click.option(
    "--storage-uri", default="pvc://models/triton", show_default=True, metavar="URI", help="Where KServe finds the repository."
)
@debug_option
def command(
    models: tuple[str, ...],
    repository: Path,
    instances: int,
    cpu: bool,
    max_batch: int | None,
    delay_us: int,
    keep_versions: int,
    storage_uri: str,
) -> None:
    """Write artifacts as a model repository of Triton Inference Server, with a manifest for KServe."""
    from deploy.serving.source import ModelSource
    from deploy.serving.triton import KSERVE, TritonOptions, export_triton

    options = TritonOptions(
        instances=instances, cpu=cpu, max_batch=max_batch, delay_us=delay_us, keep_versions=keep_versions, storage_uri=storage_uri
    )
    for folder in export_triton([ModelSource.parse(text) for text in models], repository, options):
        click.echo(folder)
    click.echo(repository / KSERVE)
