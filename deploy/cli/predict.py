"""`deploy predict`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from deploy.cli.options import PATH
from deploy.errors import UsageError
from deploy.words import printable

if TYPE_CHECKING:
    from deploy.evaluation.predict import Predicted

SCHEMA = 1
_CLASSES = 5


@click.command("predict")
@click.argument("paths", nargs=-1, metavar="[ARTIFACT] IMAGE|DIR...")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, metavar="K", help="Classes shown an image.")
@click.option(
    "--min-score", type=click.FloatRange(0, 1), default=0.3, show_default=True, metavar="P", help="Leave out boxes below it."
)
@click.option("-o", "out", type=PATH, metavar="DIR", help="Write a PNG of each image: its mask, or the image with its boxes.")
@backend_option
@device_option
@threads_option
@json_option
@debug_option
def command(paths: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Show what a model makes of images: the likeliest classes, the classes of a mask, or boxes in pixels (x1 y1 x2 y2).

    Files that cannot be used are said at the end, with exit status 1; the others have their results.
    """
    from deploy.evaluation.predict import predict  # loads heavy libraries

    named = bool(paths) and (paths[0].endswith(".onnx") or (Path(paths[0]) / MANIFEST).is_file())
    images = [Path(path) for path in paths[named:]]
    if not images:
        raise UsageError("expected [ARTIFACT] IMAGE|DIR..., and no image was named")
    artifact = open_or_newest(paths[0] if named else None, "artifact that takes images", classifier)
    with Failures() as failures, progress_bar() as progress:
        predictions: Sequence[Predicted] = predict(artifact, images, progress=progress, skip=failures.skip, **given)
    if as_json:
        found = [prediction.to_json() for prediction in predictions]
        document = {"schema": SCHEMA, "predictions": found, "failed": failures.to_json()}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        for prediction in predictions:
            click.echo(f"{printable(prediction.path)}: {_text(prediction)}")
    failures.end()


def _text(prediction: "Predicted") -> str:
    from deploy.evaluation.predict import Detected, Prediction

    if isinstance(prediction, Prediction):
        return ", ".join(f"{name} {share:.1%}" for name, share in prediction.classes)
    picture = f" -> {printable(prediction.picture)}" if prediction.picture else ""
    if isinstance(prediction, Detected):
        boxes = [f"{name} {score:.0%} at {' '.join(f'{part:.0f}' for part in box)}" for name, score, box in prediction.boxes]
        return (", ".join(boxes) or "nothing") + picture
    return ", ".join(f"{name} {share:.1%}" for name, share in prediction.classes[:_CLASSES]) + picture
