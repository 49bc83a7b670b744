"""`deploy predict`."""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from deploy.artifact.artifact import Artifact
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
from deploy.cli.options import PATH, options
from deploy.errors import UsageError
from deploy.evaluation.many_options import SUFFIXES, ActorOptions, BatchOptions
from deploy.options import collect, option_names
from deploy.words import as_utf8, count_of, printable

if TYPE_CHECKING:
    from deploy.evaluation.predict import Predicted

SCHEMA = 1
_CLASSES = 5
_SAY_S = 10.0


@click.command("predict")
@click.argument("paths", nargs=-1, metavar="[ARTIFACT] IMAGE|DIR|PATTERN|LIST...")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, metavar="K", help="Classes shown an image.")
@click.option(
    "--min-score", type=click.FloatRange(0, 1), default=0.3, show_default=True, metavar="P", help="Leave out boxes below it."
)
@click.option(
    "-o",
    "--out",
    type=PATH,
    metavar="FILE|DIR",
    help="Write a row for each image to FILE.jsonl or FILE.parquet, and go on where it was interrupted; or into DIR a PNG of each, its mask"
    " or the image with its boxes.",
)
@options(BatchOptions)
@click.option(
    "--ray",
    "address",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="With --out: compute on the Ray cluster at ADDRESS.  [without ADDRESS: this machine's cluster, or a new one]",
)
@options(ActorOptions)
@backend_option
@device_option
@threads_option
@json_option
@debug_option
def command(
    paths: tuple[str, ...],
    top: int,
    min_score: float,
    out: Path | None,
    backend: str,
    device: str,
    threads: int | None,
    as_json: bool,
    address: str | None,
    **given: Any,
) -> None:
    """Show what a model makes of images: the likeliest classes, the classes of a mask, or boxes in pixels (x1 y1 x2 y2).

    Files that cannot be used are said at the end, with exit status 1; the others have their results. With --out FILE, any number of files is
    taken, .npz too: of folders, of patterns in quotes, and of lists of paths, .txt or .parquet.
    """
    from deploy.evaluation.predict import predict  # loads heavy libraries

    named = bool(paths) and (paths[0].endswith(".onnx") or (Path(paths[0]) / MANIFEST).is_file())
    images = [Path(path) for path in paths[named:]]
    if not images:
        raise UsageError("expected [ARTIFACT] IMAGE|DIR..., and no image was named")
    rows_file = out if out is not None and out.suffix.lower() in SUFFIXES else None
    on = _actors(address, rows_file, given)
    common: dict[str, Any] = {"top": top, "min_score": min_score, "backend": backend, "device": device, "threads": threads}
    artifact = open_or_newest(paths[0] if named else None, "artifact that takes images", classifier)
    if rows_file is not None:
        _predict_many(artifact, paths[named:], rows_file, collect(BatchOptions, given, **common), on, as_json)
        return
    with Failures() as failures, progress_bar() as progress:
        predictions: Sequence[Predicted] = predict(artifact, images, out=out, progress=progress, skip=failures.skip, **common)
    if as_json:
        found = [prediction.to_json() for prediction in predictions]
        document = {"schema": SCHEMA, "predictions": found, "failed": failures.to_json()}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        for prediction in predictions:
            click.echo(f"{printable(prediction.path)}: {_text(prediction)}")
    failures.end()


def _typed(names: Sequence[str]) -> list[str]:
    """Those of the parameters that stand on the command line."""
    source = click.get_current_context().get_parameter_source
    return [name for name in names if source(name) is ParameterSource.COMMANDLINE]


def _actors(address: str | None, rows_file: Path | None, given: dict[str, Any]) -> ActorOptions | None:
    """None without `--ray`. Raises UsageError for options that do not fit together."""
    typed = _typed(list(given))
    if rows_file is None and (address is not None or typed):
        raise UsageError(f"{'--ray' if address is not None else f'`{typed[0]}`'} needs --out FILE.jsonl or FILE.parquet")
    if address is None:
        if alone := [name for name in typed if name in option_names(ActorOptions)]:
            raise UsageError(f"`{alone[0]}` needs --ray")
        return None
    return collect(ActorOptions, given, address=address or None)


def _predict_many(
    artifact: Artifact, sources: Sequence[str], out: Path, options: BatchOptions, on: ActorOptions | None, as_json: bool
) -> None:
    from deploy.evaluation.many import predict_many, rows_here
    from deploy.evaluation.results import kind_of

    kind = kind_of(artifact, options)
    for name, of, what in (("top", "classify", "the classes of classifiers"), ("min_score", "detect", "the boxes of detectors")):
        if kind != of and _typed((name,)):
            raise UsageError(f"`{name}` is for {what}, and the rows of {artifact.shown} have none: leave it out")
    if kind == "raw" and not options.raw:
        click.echo(f"{artifact.shown} is no classifier, segmenter or detector: its outputs are written as they are", err=True)
    rows = rows_here
    if on is not None:
        from deploy.evaluation.ray_rows import rows_on_ray  # loads Ray

        rows = partial(rows_on_ray, on=on)
    with progress_bar() as progress:
        said = start = time.monotonic()
        before: int | None = None

        def report(count: int, errors: int) -> None:
            nonlocal said, before
            before = count if before is None else before
            now = time.monotonic()
            text = f"{count_of(count, 'row')}, {count_of(errors, 'error')}, {(count - before) / max(now - start, 1e-3):,.0f} a second"
            progress(text)
            if not sys.stderr.isatty() and now - said > _SAY_S:
                said = now
                click.echo(text, err=True)

        count, errors = predict_many(artifact, sources, out, options, rows=rows, report=report)
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "out": as_utf8(out), "rows": count, "errors": errors}, indent=2))
    else:
        click.echo(f"{count_of(count, 'row')} in {printable(out)}, {count_of(errors, 'error')}")
    if errors:
        raise click.exceptions.Exit(1)


def _text(prediction: "Predicted") -> str:
    from deploy.evaluation.predict import Detected, Prediction

    if isinstance(prediction, Prediction):
        return ", ".join(f"{name} {share:.1%}" for name, share in prediction.classes)
    picture = f" -> {printable(prediction.picture)}" if prediction.picture else ""
    if isinstance(prediction, Detected):
        boxes = [f"{name} {score:.0%} at {' '.join(f'{part:.0f}' for part in box)}" for name, score, box in prediction.boxes]
        return (", ".join(boxes) or "nothing") + picture
    return ", ".join(f"{name} {share:.1%}" for name, share in prediction.classes[:_CLASSES]) + picture
