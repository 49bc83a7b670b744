"""Predicts the likeliest classes of single images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.data.image_folder import image_batches, images_under
from deploy.errors import DataError, UsageError
from deploy.evaluation.classifier import check_names, classifier, likeliest, warn_if_null
from deploy.progress import Progress, silent
from deploy.runtime.load import load


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The likeliest classes of one image, best first, with their probabilities (0 to 1: softmax of the logits)."""

    path: Path
    classes: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "classes": [{"class": name, "probability": p} for name, p in self.classes]}


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
) -> list[Prediction]:
    """The `top` likeliest classes of every image, or all classes if there are fewer, in the order of `paths`.

    A directory means all images at any depth in it, sorted. If the manifest has no class names, the name of a class is its
    index. Raises the errors of `evaluate`.
    """
    if top < 1:
        raise UsageError(f"top must be 1 or more, not {top}")
    artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    source, logits = classifier(artifact)
    paths = [paths] if isinstance(paths, str | Path) else paths
    files = [file for path in paths for file in _expand(Path(path))]
    if not files:
        raise UsageError("no image to predict")
    size, reason = source.batch_size(batch_size)
    what = f"predicting with {artifact.manifest.name}" + (f" ({reason})" if reason else "")
    samples = [(file, 0) for file in files]
    predictions: list[Prediction] = []
    with load(artifact, backend, device, threads=threads) as session:
        warn_if_null(session.backend)
        for feed, rows in image_batches(source, samples, size):
            scores = session.run(feed)[logits.name][: len(rows)]
            check_names(artifact, scores.shape[1])
            for classes in likeliest(scores, artifact.manifest.classes, top):
                predictions.append(Prediction(path=files[len(predictions)], classes=classes))
            progress(what, len(predictions), len(files))
    return predictions


def _expand(path: Path) -> list[Path]:
    """`path` itself, or the images in it. Raises DataError if it does not exist or is a directory without images."""
    if path.is_dir():
        return images_under(path)
    if not path.exists():
        raise DataError(f"no image at {path}")
    return [path]
