"""`deploy eval`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.artifact.artifact import Artifact
from deploy.artifact.summary import metric_text, number_text, points_text, quantized_text, range_text
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
from deploy.evaluation.options import MetricOptions
from deploy.words import count_of, printable

if TYPE_CHECKING:
    from deploy.evaluation.evaluate import Evaluation

_CLASSES = 5
"""The worst classes, confusions and inputs that are shown."""


@click.command("eval")
@click.argument("paths", nargs=-1, metavar="[ARTIFACT] DIR|FILE.json")
@options(MetricOptions)
@click.option("--against", metavar="ARTIFACT", help="Run another artifact beside it, and say on which inputs the two differ.")
@click.option("--report", type=PATH, metavar="FILE.html", help="Write a page with all this, and pictures of what differs.")
@backend_option
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, metavar="B", help="Images a run.")
@device_option
@threads_option
@json_option
@debug_option
def command(paths: tuple[str, ...], against: str | None, report: Path | None, as_json: bool, **given: Any) -> None:
    """Measure a metric on labelled data: by default top-1 and top-5 accuracy on an ImageFolder, one folder of images a class.

    miou takes a folder with images/ and masks/ (PNGs of class indices), map a COCO JSON with its images beside it, sqnr and
    cosine any images, and a metric of your own any of these; all but map take a folder of .npz files too. Names of folders and
    categories are paired with the class names in the manifest, so that some of the classes will do. Files that cannot be used are
    said at the end, with exit status 1; the score is that of the others.
    """
    from deploy.artifact.find import open_artifact
    from deploy.evaluation.evaluate import evaluate  # loads heavy libraries

    if len(paths) not in (1, 2):
        raise UsageError(f"expected [ARTIFACT] DIR|FILE.json, not {len(paths)} arguments")
    if report is not None and report.suffix != ".html":
        raise UsageError(f"--report takes a FILE ending in .html, not {report}")
    artifact = open_or_newest(paths[0] if len(paths) == 2 else None, "artifact that takes images", classifier)
    other = None if against is None else open_artifact(against)
    with Failures() as failures, progress_bar() as progress:
        result = evaluate(artifact, paths[-1], against=other, progress=progress, skip=failures.skip, **given)
    if report is not None:
        from deploy.evaluation.page import write_page

        write_page(report, artifact, result)
    if as_json:
        click.echo(json.dumps({**result.to_json(), "failed": failures.to_json()}, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join([_headline(artifact, result), *_details(result)]))
    failures.end()


def _headline(artifact: Artifact, result: "Evaluation") -> str:
    where = f"{result.backend} ({result.file})" if artifact.cpu_path else result.backend
    if result.top1 is not None:
        score = f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %"
    else:
        interval = "" if result.low is None else f" (95 % interval {range_text(result.low, result.high, result.unit)})"
        score = f"{metric_text(result.metric)} {points_text(result.value, result.unit)}{interval}"
    return (
        f"{artifact.shown} on {where}: {score}, {count_of(result.images, 'image')}, {result.images_per_s:.0f} images/s with decoding"
        f"{quantized_text(artifact.manifest)}"
    )


def _details(result: "Evaluation") -> list[str]:
    """The worst classes and confusions, and where another artifact differs, in lines."""
    lines = []
    known = sorted((each for each in result.classes if each.value is not None), key=lambda each: each.value or 0.0)
    if worst := [f"{each.name} {each.value:.1f} %" for each in known[:_CLASSES]]:
        lines.append(f"  {'worst of' if len(known) > _CLASSES else 'classes':<10} {_of(worst, len(known))}")
    if result.confusions:
        times = [f"{each.actual} for {each.predicted} {each.count:,}" for each in result.confusions[:_CLASSES]]
        lines.append(f"  {'confusions':<10} {', '.join(times)}")
    if result.against is None:
        return lines
    other = result.against
    if other.loss is not None and other.value is not None:
        interval = (
            "" if other.loss_low is None else f" (95 % interval {range_text(other.loss_low, other.loss_high, result.unit)})"
        )
        lines.append(
            f"  {'against':<10} {other.artifact} {points_text(other.value, result.unit)}: loss {number_text(other.loss, result.unit)}{interval}"
        )
    lines.append(f"  {'differing':<10} {len(other.differing):,} of {count_of(result.images, 'input')} from {other.artifact}")
    for each in list(other.differing)[:_CLASSES]:
        answers = each.answer if each.answer == each.other else f"{each.answer}, and {each.other}"
        right = f" (it is {each.right})" if each.right is not None else ""
        lines.append(f"  {'':<10} {printable(each.path)}: {answers}{right}")
    return lines


def _of(worst: Sequence[str], count: int) -> str:
    return f"{count} classes: {', '.join(worst)}" if count > len(worst) else ", ".join(worst)
