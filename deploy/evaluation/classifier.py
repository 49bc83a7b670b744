"""Image classifiers: checks that an artifact is one, and names the likeliest classes of its logits."""

import logging
from collections.abc import Sequence

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import TensorSpec, format_specs
from deploy.data.images import ImageInput, image_input
from deploy.errors import UsageError
from deploy.runtime.catalog import BACKENDS
from deploy.words import count_of

logger = logging.getLogger(__name__)


def likeliest(logits: np.ndarray, names: Sequence[str] | None, top: int) -> list[tuple[tuple[str, float], ...]]:
    """The `top` likeliest classes of every row of logits (N, classes), best first, with their probabilities.

    Without `names` the name of a class is its index.
    """
    classes = []
    for row in softmax(logits):
        best = np.argsort(-row, kind="stable")[:top]
        classes.append(tuple((names[index] if names else str(index), float(row[index])) for index in best))
    return classes


def softmax(logits: np.ndarray) -> np.ndarray:
    """The probabilities, (N, classes) float64, for logits of the same shape."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def classifier(artifact: Artifact) -> tuple[ImageInput, TensorSpec]:
    """The only input, of images, and the output (logits) of an artifact. Raises UsageError if it is no image classifier."""
    return image_input(artifact), class_scores(artifact)


def class_scores(artifact: Artifact) -> TensorSpec:
    """The only output of a classifier, (batch, classes). Raises UsageError if it has another, or names that are not as many."""
    outputs = artifact.manifest.outputs
    if len(outputs) != 1 or len(outputs[0].shape) != 2:
        raise UsageError(f"{artifact.location} gives {format_specs(outputs)}; expected one output of shape batch x classes")
    count = outputs[0].shape[1]
    if isinstance(count, int):
        check_names(artifact, count)
    return outputs[0]


def check_names(artifact: Artifact, count: int) -> None:
    """Raise UsageError if the manifest has class names, but not `count` of them."""
    names = artifact.manifest.classes
    if names is not None and len(names) != count:
        raise UsageError(
            f"{artifact.location} has {count_of(count, 'class')} and {count_of(len(names), 'class name')}; export it with the right ones"
        )


def warn_if_null(backend: str) -> None:
    """Log a warning that the classes mean nothing where `backend` computes nothing."""
    if not BACKENDS[backend].computes:
        logger.warning("%s computes nothing: all logits are 0, so that only the speed means something", backend)


def class_name(artifact: Artifact, index: int) -> str:
    """The name of a class; its number where it has none."""
    names = artifact.manifest.classes
    return names[index] if names and index < len(names) else str(index)
