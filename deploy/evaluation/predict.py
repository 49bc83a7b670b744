"""Predicts single images: the likeliest classes, a mask, or boxes, by what the model gives."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.decode import Detections
from deploy.artifact.find import open_artifact
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import Feed
from deploy.data.image_folder import image_batches, images_under
from deploy.data.images import image_inputs
from deploy.data.records import record_input
from deploy.data.table import find_table
from deploy.errors import DataError, OutputError, UsageError
from deploy.evaluation.classifier import check_names, class_scores, likeliest, warn_if_null
from deploy.evaluation.detector import boxes_json, detect, named_boxes, placement_of
from deploy.evaluation.differences import shown
from deploy.evaluation.labelled import Batch, Skip, run_batch
from deploy.evaluation.pictures import OUTSIDE, boxed, mask_image, picture
from deploy.evaluation.profiles import nearest_batch
from deploy.evaluation.segmenter import picture_map, shares
from deploy.evaluation.tasks import task_of
from deploy.progress import Progress, silent
from deploy.runtime.load import load
from deploy.words import as_utf8, printable


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The likeliest classes of one image, best first, with their probabilities (0 to 1: softmax of the logits)."""

    path: Path
    classes: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        return {"path": as_utf8(self.path), "classes": [{"class": name, "probability": p} for name, p in self.classes]}


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """The class map of one image.

    classes: the classes in it, the largest first, with their shares of the pixels (0 to 1). mask: (height, width) of the image,
    indices of classes, and 255 where the preprocessing cut it off; None where it was written to the file `picture`.
    """

    path: Path
    classes: tuple[tuple[str, float], ...]
    mask: np.ndarray | None = field(repr=False, compare=False)
    picture: Path | None = None

    def to_json(self) -> dict[str, Any]:
        shares = [{"class": name, "share": share} for name, share in self.classes]
        return {"path": as_utf8(self.path), "classes": shares, **_written(self.picture)}


@dataclass(frozen=True, kw_only=True)
class Detected:
    """The boxes found in one image, the likeliest first: class, score (0 to 1), and corners x1, y1, x2, y2 in its pixels.

    picture: the file that they were drawn into, if they were.
    """

    path: Path
    boxes: tuple[tuple[str, float, tuple[float, float, float, float]], ...]
    picture: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {"path": as_utf8(self.path), "boxes": boxes_json(self.boxes), **_written(self.picture)}


def _written(path: Path | None) -> dict[str, str]:
    return {} if path is None else {"picture": as_utf8(path)}


Predicted = Prediction | Segmented | Detected


def predict(
    artifact: Artifact | Path | str,
    paths: Sequence[Path | str] | Path | str,
    *,
    top: int = 5,
    min_score: float = 0.3,
    out: Path | str | None = None,
    backend: str = "auto",
    batch_size: int = 32,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
    skip: Skip | None = None,
) -> list[Prediction] | list[Segmented] | list[Detected]:
    """What a model makes of every image, in the order of `paths`: `Prediction` of a classifier, `Segmented`, or `Detected`.

    top: of a classifier, the likeliest classes, or all if there are fewer. min_score: of a detector, boxes with less are left out.
    out: of the other two, a folder for a PNG of each image: its mask with a palette, or the image with its boxes.

    A directory means all images at any depth in it, sorted. If the manifest has no class names, the name of a class is its
    index. A model that takes more than an image finds the rest in the table of the nearest folder up from it that has
    one (`deploy.data.table`).

    skip: called with a path that cannot be used and the error, which leaves it out; without it the error is raised. Raises
    the errors of `evaluate`, and OutputError where `out` cannot be written.
    """
    if top < 1:
        raise UsageError(f"top must be 1 or more, not {top}")
    if not 0 <= min_score <= 1:
        raise UsageError(f"min_score must be 0 to 1, not {min_score:g}")
    artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    task = task_of(artifact)
    preprocess = image_inputs(artifact)[0].preprocess  # raises now what no path can mend
    if out is not None and task == "classify":
        raise UsageError(
            f"{artifact.location} is a classifier, and there are no pictures of its answers: leave out `out`;"
            " `deploy predict` writes rows of them to FILE.jsonl or FILE.parquet"
        )
    paths = [paths] if isinstance(paths, str | Path) else paths
    found = [entry for path in paths for entry in _expand(Path(path), len(artifact.manifest.inputs) > 1, skip)]
    if not found:
        if paths:
            return []  # all of them were left out
        raise UsageError("no image to predict")
    files = [file for file, _, _ in found]
    targets = None if out is None else _targets(Path(out), files, [root for _, _, root in found])
    readers: dict[str, Callable[[Feed, Sequence[int]], list[Any]]] = {
        "classify": lambda results, rows: _classified(artifact, results, [files[row] for row in rows], top),
        "segment": lambda results, rows: _segmented(artifact, preprocess, results, [files[row] for row in rows]),
        "detect": lambda results, rows: _detected(artifact, preprocess, results, [files[row] for row in rows], min_score),
    }
    source = record_input(artifact, [folder for _, folder, _ in found])
    size, reason = source.batch_size(batch_size)
    samples = [(file, index) for index, file in enumerate(files)]
    predictions: list[Any] = []
    with load(artifact, backend, device, threads=threads) as session:
        warn_if_null(session.backend)
        size, reason = nearest_batch(session, size, reason)
        what = f"predicting with {artifact.manifest.name}" + (f" ({reason})" if reason else "")
        for feed, rows in image_batches(source, samples, size, skip=skip):
            results = run_batch(session, Batch(feed, rows, tuple(files[row] for row in rows)), skip)
            if results is None:
                continue
            made = readers[task](results, rows.tolist())
            if targets is not None:
                made = [_drawn(each, targets[row], artifact, preprocess) for each, row in zip(made, rows, strict=True)]
            predictions += made
            progress(what, len(predictions), len(files))
    return predictions


def _classified(artifact: Artifact, results: Feed, files: Sequence[Path], top: int) -> list[Prediction]:
    scores = results[class_scores(artifact).name][: len(files)]
    check_names(artifact, scores.shape[1])
    found = likeliest(scores, artifact.manifest.classes, top)
    return [Prediction(path=path, classes=classes) for path, classes in zip(files, found, strict=True)]


def _segmented(artifact: Artifact, preprocess: Preprocess, results: Feed, files: Sequence[Path]) -> list[Segmented]:
    made = []
    for row, path in enumerate(files):
        mask = picture_map(artifact, results, row, placement_of(preprocess, path), OUTSIDE)
        made.append(Segmented(path=path, classes=shares(artifact, mask), mask=mask))
    return made


def _detected(artifact: Artifact, preprocess: Preprocess, results: Feed, files: Sequence[Path], least: float) -> list[Detected]:
    found = detect(artifact, results, [placement_of(preprocess, path) for path in files])
    return [Detected(path=path, boxes=named_boxes(artifact, shown(each, least))) for path, each in zip(files, found, strict=True)]


def _drawn(made: Segmented | Detected, target: Path, artifact: Artifact, preprocess: Preprocess) -> Segmented | Detected:
    """What was predicted, with its picture in the file `target`. Raises OutputError."""
    if isinstance(made, Segmented):
        assert made.mask is not None
        image = mask_image(made.mask)
    else:
        names = list(dict.fromkeys(name for name, _, _ in made.boxes))
        names = artifact.manifest.classes or names
        boxes = np.array([box for _, _, box in made.boxes], np.float32).reshape(-1, 4)
        labels = np.array([names.index(name) for name, _, _ in made.boxes], np.int64)
        scores = np.array([score for _, score, _ in made.boxes], np.float32)
        image = boxed(picture(made.path, preprocess), Detections(boxes, scores, labels), names)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, "PNG")
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    if isinstance(made, Segmented):
        return Segmented(path=made.path, classes=made.classes, mask=None, picture=target)
    return Detected(path=made.path, boxes=made.boxes, picture=target)


def _targets(out: Path, files: Sequence[Path], roots: Sequence[Path]) -> list[Path]:
    """The PNG of every image in the folder `out`, by its path from the directory that was named on.

    Raises UsageError where two would be one file, or one would replace an image, and OutputError where `out` is no folder.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is not a directory; choose another `out`")
    made = [out / file.relative_to(root).with_suffix(".png") for file, root in zip(files, roots, strict=True)]
    taken: dict[str, Path] = {}
    own = {os.path.realpath(file) for file in files}
    for file, target in zip(files, made, strict=True):
        place = os.path.realpath(target)
        if place in own:
            raise UsageError(f"the picture of {printable(file)} would replace {printable(target)}; choose another `out`")
        if (other := taken.setdefault(place, file)) != file:
            raise UsageError(
                f"the pictures of {printable(other)} and {printable(file)} would be one file, {printable(target)}:"
                " name the directory that both are in"
            )
    return made


def _expand(path: Path, table: bool, skip: Skip | None) -> list[tuple[Path, Path, Path]]:
    """`path` itself, or the images in it, each with the nearest folder up from it that has a table if there must be one, and the
    folder that its place is told from.

    Raises DataError if it does not exist or is a directory without images, unless `skip` takes the error.
    """
    try:
        if not path.exists():
            raise DataError(f"no image at {printable(path)}")
        files, folder = (images_under(path), path) if path.is_dir() else ([path], path.parent)
        root, above = folder, folder.absolute()
        if table and (found := next(filter(find_table, (above, *above.parents)), None)):
            folder = found
        return [(file, folder, root) for file in files]
    except DataError as error:
        if skip is None:
            raise
        skip(path, error)
        return []
