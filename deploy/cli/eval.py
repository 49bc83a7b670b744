"""`deploy eval`."""

import json

import click

from deploy.artifact.summary import quantized_text
from deploy.cli.common import (
    Failures,
    backend_option,
    classifier,
    debug_option,
    device_option,
    json_option,
    open_or_newest,
    progress_bar,
    threads_option,
)
from deploy.errors import UsageError
from deploy.words import count_of


@click.command("eval")
@click.argument("paths", nargs=-1, metavar="[ARTIFACT] IMAGEFOLDER")
@backend_option
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, metavar="B", help="Images a run.")
@device_option
@threads_option
@json_option
@debug_option
def command(paths: tuple[str, ...], backend: str, batch_size: int, device: str, threads: int | None, as_json: bool) -> None:
    """Measure top-1 and top-5 accuracy on an ImageFolder: a folder with one folder of images a class.

    Folder names are paired with the class names in the manifest, so a folder with some of the classes will do. Files that
    cannot be used are said at the end, with exit status 1; accuracy is that of the others.
    """
    from deploy.evaluation.evaluate import evaluate  # loads heavy libraries

    if len(paths) not in (1, 2):
        raise UsageError(f"expected [ARTIFACT] IMAGEFOLDER, not {len(paths)} arguments")
    artifact = open_or_newest(paths[0] if len(paths) == 2 else None, "classifier", classifier)
    with Failures() as failures, progress_bar() as progress:
        result = evaluate(
            artifact,
            paths[-1],
            backend=backend,
            batch_size=batch_size,
            device=device,
            threads=threads,
            progress=progress,
            skip=failures.skip,
        )
    if as_json:
        click.echo(json.dumps({**result.to_json(), "failed": failures.to_json()}, indent=2, ensure_ascii=False))
    else:
        where = f"{result.backend} ({result.file})" if artifact.cpu_path else result.backend
        click.echo(
            f"{artifact.shown} on {where}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, {count_of(result.images, 'image')},"
            f" {result.images_per_s:.0f} images/s with decoding{quantized_text(artifact.manifest)}"
        )
    failures.end()
