"""Detectors: boxes of their outputs, in the pixels of the pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.decode import Decode, Detections
from deploy.artifact.image_ops import picture_size
from deploy.artifact.placement import Placement
from deploy.artifact.preprocess import Preprocess
from deploy.errors import DataError, UsageError
from deploy.evaluation.classifier import class_name


def decode_of(artifact: Artifact) -> Decode:
    """How the outputs of a detector become boxes. Raises UsageError where the manifest does not say, or it reads other outputs."""
    manifest = artifact.manifest
    if manifest.decode is None:
        raise UsageError(
            f"{artifact.location} does not say how its outputs become boxes: export it with --decode: yolo, ssd or FILE.py:FUNCTION"
        )
    manifest.decode.check(manifest.outputs, _classes(artifact))
    return manifest.decode


def detect(artifact: Artifact, results: Mapping[str, np.ndarray], placements: Sequence[Placement | None]) -> list[Detections]:
    """The boxes of the first rows of `results`, one for each of `placements`, as corners in the pixels of its picture; those of the
    array where the placement is None.

    Raises UserCodeError where the user's function fails, and DataError for a label that is no class.
    """
    manifest = artifact.manifest
    found = decode_of(artifact)(results, manifest.outputs, _classes(artifact), artifact.path)[: len(placements)]
    names = manifest.classes
    for each in found:
        if names is not None and len(each.labels) and not 0 <= each.labels.min() <= each.labels.max() < len(names):
            raise DataError(
                f"{artifact.location} finds boxes of class {each.labels.max()}, and has {len(names)} class names; export it with the"
                " right ones"
            )
    return [
        each if placement is None else Detections(placement.boxes_to_picture(each.boxes), each.scores, each.labels)
        for each, placement in zip(found, placements, strict=True)
    ]


def placement_of(preprocess: Preprocess, source: Path | bytes) -> Placement:
    """Where the picture in a file, or in its bytes, lies in its array. Raises DataError, and UsageError where a function makes it."""
    width, height, turned = picture_size(source)
    return preprocess.placement(*(turned if preprocess.exif_orientation else (width, height)))


def _classes(artifact: Artifact) -> int | None:
    return None if artifact.manifest.classes is None else len(artifact.manifest.classes)


def named_boxes(artifact: Artifact, found: Detections) -> tuple[tuple[str, float, tuple[float, float, float, float]], ...]:
    """Boxes with the names of their classes."""
    made = []
    for box, score, label in zip(*found, strict=True):
        x1, y1, x2, y2 = (float(part) for part in box)
        made.append((class_name(artifact, int(label)), float(score), (x1, y1, x2, y2)))
    return tuple(made)


def boxes_json(boxes: Sequence[tuple[str, float, tuple[float, ...]]]) -> list[dict[str, Any]]:
    """Boxes as they stand in JSON."""
    return [{"class": name, "score": score, "box": list(box)} for name, score, box in boxes]
