"""Predicts the likeliest classes of single images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.data.image_folder import image_batches, images_under
from deploy.data.images import image_inputs
from deploy.data.records import record_input
from deploy.data.table import find_table
from deploy.errors import DataError, UsageError
from deploy.evaluation.classifier import check_names, class_scores, likeliest, warn_if_null
from deploy.evaluation.labelled import Batch, Skip, run_batch
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


def predict(
    artifact: Artifact | Path | str,
    paths: Sequence[Path | str] | Path | str,
    *,
    top: int = 5,
    backend: str = "auto",
    batch_size: int = 32,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
    skip: Skip | None = None,
) -> list[Prediction]:
    """The `top` likeliest classes of every image, or all classes if there are fewer, in the order of `paths`.

    A directory means all images at any depth in it, sorted. If the manifest has no class names, the name of a class is its
    index. A model that takes more than an image finds the rest in the table of the nearest folder up from it that has
    one (`deploy.data.table`).

    skip: called with a path that cannot be used and the error, which leaves it out; without it the error is raised. Raises
    the errors of `evaluate`.
    """
    if top < 1:
        raise UsageError(f"top must be 1 or more, not {top}")
    artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    logits = class_scores(artifact)
    image_inputs(artifact)  # raises now what no path can mend
    paths = [paths] if isinstance(paths, str | Path) else paths
    found = [entry for path in paths for entry in _expand(Path(path), len(artifact.manifest.inputs) > 1, skip)]
    if not found:
        if paths:
            return []  # all of them were left out
        raise UsageError("no image to predict")
    files = [file for file, _ in found]
    source = record_input(artifact, [folder for _, folder in found])
    size, reason = source.batch_size(batch_size)
    what = f"predicting with {artifact.manifest.name}" + (f" ({reason})" if reason else "")
    samples = [(file, index) for index, file in enumerate(files)]
    predictions: list[Prediction] = []
    with load(artifact, backend, device, threads=threads) as session:
        warn_if_null(session.backend)
        for feed, rows in image_batches(source, samples, size, skip=skip):
            results = run_batch(session, Batch(feed, rows, tuple(files[row] for row in rows)), skip)
            if results is None:
                continue
            scores = results[logits.name][: len(rows)]
            check_names(artifact, scores.shape[1])
            for row, classes in zip(rows, likeliest(scores, artifact.manifest.classes, top), strict=True):
                predictions.append(Prediction(path=files[row], classes=classes))
            progress(what, len(predictions), len(files))
    return predictions


def _expand(path: Path, table: bool, skip: Skip | None) -> list[tuple[Path, Path]]:
    """`path` itself, or the images in it, each with the nearest folder up from it that has a table if there must be one.

    Raises DataError if it does not exist or is a directory without images, unless `skip` takes the error.
    """
    try:
        if not path.exists():
            raise DataError(f"no image at {printable(path)}")
        files, folder = (images_under(path), path) if path.is_dir() else ([path], path.parent)
        above = folder.absolute()
        if table and (found := next(filter(find_table, (above, *above.parents)), None)):
            folder = found
        return [(file, folder) for file in files]
    except DataError as error:
        if skip is None:
            raise
        skip(path, error)
        return []
