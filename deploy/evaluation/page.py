"""The page of an evaluation: the score, classes and confusions, and pictures of the inputs on which two artifacts differ."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.artifact.decode import Detections
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.summary import metric_text, number_text, points_text, range_text
from deploy.errors import DataError, OutputError
from deploy.evaluation.differences import Differing
from deploy.evaluation.evaluate import Evaluation
from deploy.evaluation.pictures import OUTSIDE, PALETTE, box_colour, boxed, marked, mask_image, overlaid, picture, png
from deploy.words import count_of, printable

_SHEET = 48
"""Inputs on the contact sheet."""
_SIDE = 192
"""Pixels of the longer side of a picture on it, at most; smaller ones are enlarged by whole numbers."""

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.score { font-size: 1.15rem; margin: .25rem 0 0; } p { margin: .25rem 0; }
table { border-collapse: collapse; } td, th { padding: .15rem .75rem .15rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border: 1px solid var(--line); vertical-align: -.05em; }
meter { width: 8rem; vertical-align: middle; }
.pair { display: flex; flex-wrap: wrap; gap: 2rem; } .sheet { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: .4rem; max-width: 100%; box-sizing: border-box; }
figure div { display: flex; flex-wrap: wrap; gap: .4rem; } figure img { display: block; max-width: 100%; }
figcaption { font-size: .85rem; max-width: 26rem; margin-top: .3rem; } small { opacity: .75; display: block; }
"""


def write_page(path: Path, artifact: Artifact, result: Evaluation) -> None:
    """Write the page, one file that needs no network. Raises OutputError."""
    try:
        path.write_text(render(artifact, result), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def render(artifact: Artifact, result: Evaluation) -> str:
    """The HTML of the page."""
    title = escape(artifact.manifest.name)
    sections = [_head(artifact, result), _tables(artifact, result), _sheet(artifact, result)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}: deploy eval</title><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def _head(artifact: Artifact, result: Evaluation) -> str:
    interval = "" if result.low is None else f", 95 % interval {range_text(result.low, result.high, result.unit)}"
    score = f"{metric_text(result.metric)} {points_text(result.value, result.unit)}{interval}"
    lines = [f"{count_of(result.images, 'image')} on {result.backend} ({result.file})"]
    if result.top1 is not None and result.metric == "top1":
        lines.insert(0, f"top-5 {result.top5:.2f} %")
    other = result.against
    if other is not None and other.value is not None and other.loss is not None:
        loss = "" if other.loss_low is None else f", 95 % interval {range_text(other.loss_low, other.loss_high, result.unit)}"
        lines.append(
            f"Against {other.artifact}, {points_text(other.value, result.unit)}: loss {number_text(other.loss, result.unit)}{loss}"
        )
    texts = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f"<header><h1>{escape(artifact.manifest.name)}</h1><p class=score>{escape(score)}</p>{texts}</header>"


def _tables(artifact: Artifact, result: Evaluation) -> str:
    coloured = zip(result.classes, _swatches(artifact, result), strict=True)
    rows = "".join(
        f"<tr><td>{swatch}{escape(each.name)}</td><td class=number>{_value(each.value)}</td><td>{_meter(each.value)}</td>"
        f"<td class=number>{each.count:,}</td></tr>"
        for each, swatch in sorted(coloured, key=lambda pair: (pair[0].value is None, pair[0].value))
    )
    name = {"miou": "IoU", "map": "AP"}.get(result.metric, escape(metric_text(result.metric)))
    what = {"miou": "pixels", "map": "boxes"}.get(result.metric, "images")
    classes = (
        f"<section><h2>By class</h2><table><tr><th>class</th><th class=number>{name}</th><th></th><th class=number>{what}</th></tr>"
        f"{rows}</table></section>"
    )
    wrong = "".join(
        f"<tr><td>{escape(each.actual)}</td><td>{escape(each.predicted)}</td><td class=number>{each.count:,}</td></tr>"
        for each in result.confusions
    )
    confusions = (
        "<section><h2>Worst confusions</h2><table><tr><th>it is</th><th>taken for</th>"
        f"<th class=number>{what}</th></tr>{wrong}</table></section>"
    )
    shown = classes * bool(rows) + confusions * bool(wrong)
    return f"<div class=pair>{shown}</div>" if shown else ""


def _swatches(artifact: Artifact, result: Evaluation) -> list[str]:
    """For each class the colour that it has in the pictures; "" where nothing is drawn."""
    names = artifact.manifest.classes
    if result.metric == "miou":
        colours = [tuple(PALETTE[min(index, OUTSIDE)]) for index in range(len(result.classes))]
    elif result.metric == "map":
        colours = [box_colour(names.index(each.name) if names else index) for index, each in enumerate(result.classes)]
    else:
        return [""] * len(result.classes)
    return [f'<span class=swatch style="background: rgb({red} {green} {blue})"></span>' for red, green, blue in colours]


def _value(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.2f} %"


def _meter(value: float | None) -> str:
    return "" if value is None else f'<meter min=0 max=100 value="{value:.2f}">{value:.0f} %</meter>'


def _sheet(artifact: Artifact, result: Evaluation) -> str:
    """The most different inputs, each with the answers of both."""
    if result.against is None:
        return ""
    names = artifact.manifest.classes or []
    preprocess = artifact.preprocess
    found = list(result.against.differing)[:_SHEET]
    cards = "".join(_card(each, names, preprocess) for each in found)
    total = len(result.against.differing)
    marked = ", and the pixels that differ" if any(isinstance(each.drawn and each.drawn[0], np.ndarray) for each in found) else ""
    intro = f"{total:,} of {count_of(result.images, 'input')}; the most different first: this artifact, then {result.against.artifact}{marked}."
    return f"<section><h2>Where they differ</h2><p>{escape(intro)}</p><div class=sheet>{cards}</div></section>"


def _card(each: Differing, names: Sequence[str], preprocess: Preprocess | None) -> str:
    images = _images(each, names, preprocess)
    answers = [each.answer] if each.answer == each.other else [f"this: {each.answer}", f"other: {each.other}"]
    right = [f"it is {each.right}"] if each.right is not None else []
    texts = "".join(f"{escape(text)}<br>" for text in [*answers, *right])
    shown = "".join(f'<img alt="" src="data:image/png;base64,{base64.b64encode(png(image)).decode()}">' for image in images)
    return f"<figure><div>{shown}</div><figcaption>{texts}<small>{escape(printable(each.path))}</small></figcaption></figure>"


def _images(each: Differing, names: Sequence[str], preprocess: Preprocess | None) -> list[Image.Image]:
    """The input, with both answers drawn where they can be; of a feed of numbers the class maps alone, or none."""
    try:
        image = picture(each.path, preprocess) if preprocess is not None else None
    except DataError:
        image = None  # a feed of numbers
    if image is None or preprocess is None:
        if each.drawn is None or isinstance(each.drawn[0], Detections):
            return []
        one, other = each.drawn
        alone = [mask_image(found).convert("RGB") for found in each.drawn]
        return [_sized(image) for image in (*alone, marked(alone[0], one != other))]
    if each.drawn is None:
        return [_sized(image)]
    if isinstance(each.drawn[0], Detections):
        return [boxed(*_enlarged(image, found), names) for found in each.drawn]
    placement = preprocess.placement(*image.size)
    one, other = (placement.map_to_picture(found, OUTSIDE) for found in each.drawn)
    return [_sized(made) for made in (overlaid(image, one), overlaid(image, other), marked(image, one != other))]


def _enlarged(image: Image.Image, found: Detections) -> tuple[Image.Image, Detections]:
    """A picture in the size of the sheet, and its boxes."""
    sized = _sized(image)
    return sized, found._replace(boxes=found.boxes * (sized.width / image.width))


def _sized(image: Image.Image) -> Image.Image:
    longer = max(image.size)
    if 2 * longer <= _SIDE:
        return image.resize((image.width * (_SIDE // longer), image.height * (_SIDE // longer)), Image.Resampling.NEAREST)
    if longer <= _SIDE:
        return image
    scale = _SIDE / longer
    return image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)))
