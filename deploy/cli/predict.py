"""`deploy predict`."""

import json
from pathlib import Path

import click

from deploy.artifact.manifest import MANIFEST
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
from deploy.words import printable

SCHEMA = 1


@click.command("predict")
@click.argument("paths", nargs=-1, metavar="[ARTIFACT] IMAGE|DIR...")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, metavar="K", help="Classes shown an image.")
@backend_option
@device_option
@threads_option
@json_option
@debug_option
def command(paths: tuple[str, ...], top: int, backend: str, device: str, threads: int | None, as_json: bool) -> None:
    """Show the likeliest classes of images, with their probabilities.

    Files that cannot be used are said at the end, with exit status 1; the others have their results.
    """
    from deploy.evaluation.predict import predict  # loads heavy libraries

    named = bool(paths) and (paths[0].endswith(".onnx") or (Path(paths[0]) / MANIFEST).is_file())
    images = [Path(path) for path in paths[named:]]
    if not images:
        raise UsageError("expected [ARTIFACT] IMAGE|DIR..., and no image was named")
    artifact = open_or_newest(paths[0] if named else None, "classifier", classifier)
    with Failures() as failures, progress_bar() as progress:
        predictions = predict(
            artifact, images, top=top, backend=backend, device=device, threads=threads, progress=progress, skip=failures.skip
        )
    if as_json:
        found = [prediction.to_json() for prediction in predictions]
        document = {"schema": SCHEMA, "predictions": found, "failed": failures.to_json()}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        for prediction in predictions:
            classes = ", ".join(f"{name} {share:.1%}" for name, share in prediction.classes)
            click.echo(f"{printable(prediction.path)}: {classes}")
    failures.end()
