"""What stands in the rows of predictions: classes, a mask, boxes, or the outputs as they are, by what the model is for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.placement import Placement
from deploy.artifact.tensors import Feed, TensorSpec
from deploy.errors import DataError, UsageError
from deploy.evaluation.classifier import check_names, class_scores, likeliest
from deploy.evaluation.detector import boxes_json, detect, named_boxes
from deploy.evaluation.differences import shown
from deploy.evaluation.many_options import BatchOptions
from deploy.evaluation.pictures import OUTSIDE, mask_image, png
from deploy.evaluation.segmenter import class_maps, map_output, picture_map, shares
from deploy.evaluation.tasks import form_of, task_of

Kind = Literal["classify", "segment", "detect", "raw"]

Columns = dict[str, tuple[str, int]]
"""The names of columns with the type of their values, and how many lists these are nested in."""

_COLUMNS: dict[Kind, Columns] = {
    "classify": {"classes": ("string", 1), "probabilities": ("float64", 1)},
    "segment": {"classes": ("string", 1), "shares": ("float64", 1), "mask": ("string", 0)},
    "detect": {"classes": ("string", 1), "scores": ("float64", 1), "boxes": ("float64", 2)},
}
_WIDER = {"float16": "float32", "bfloat16": "float32"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a model makes of one image, or of one row of an `.npz` file.

    values: as they stand in JSON. mask: a PNG of class indices, which goes into a file of its own. numbers: how many there are, where
    they may be many.
    """

    values: dict[str, Any]
    mask: bytes | None = None
    numbers: int = 0


def kind_of(artifact: Artifact, options: BatchOptions) -> Kind:
    """What the rows of a model hold. Raises UsageError where its outputs contradict its manifest."""
    if options.raw or form_of(artifact) is None:
        return "raw"
    return task_of(artifact)


class Reader:
    """Makes results of the outputs of a model.

    Raises UsageError for outputs that are not of one row an image.
    """

    def __init__(self, artifact: Artifact, options: BatchOptions) -> None:
        self._artifact = artifact
        self._options = options
        self.kind = kind_of(artifact, options)
        batch = artifact.manifest.inputs[0].shape[0] if artifact.manifest.inputs[0].shape else None
        for spec in artifact.manifest.outputs if self.kind == "raw" else ():
            if not spec.shape or (spec.shape[0] != batch and isinstance(spec.shape[0], int)):
                raise UsageError(f"{artifact.location} gives {spec}, which has no row for each image")

    @property
    def columns(self) -> Columns:
        """Those of a table of results."""
        if self.kind != "raw":
            return _COLUMNS[self.kind]
        return {spec.name: (_WIDER.get(spec.dtype, spec.dtype), len(spec.shape) - 1) for spec in self._artifact.manifest.outputs}

    def read(self, outputs: Feed, places: Sequence[Placement | None]) -> list[Result]:
        """The results of the first rows, one for each of `places`: where the picture lies in its array; None without a picture.

        Raises UsageError, and what `detect` raises.
        """
        return {"classify": self._classes, "segment": self._masks, "detect": self._boxes, "raw": self._raw}[self.kind](
            outputs, places
        )

    def _classes(self, outputs: Feed, places: Sequence[Placement | None]) -> list[Result]:
        scores = outputs[class_scores(self._artifact).name][: len(places)]
        check_names(self._artifact, scores.shape[1])
        found = likeliest(scores, self._artifact.manifest.classes, self._options.top)
        return [Result(values={"classes": [{"class": name, "probability": share} for name, share in each]}) for each in found]

    def _masks(self, outputs: Feed, places: Sequence[Placement | None]) -> list[Result]:
        made = []
        for row, place in enumerate(places):
            if place is None:
                (mask,) = class_maps(self._artifact, outputs[map_output(self._artifact).name][row : row + 1])
            else:
                mask = picture_map(self._artifact, outputs, row, place, OUTSIDE)
            listed = [{"class": name, "share": share} for name, share in shares(self._artifact, mask)]
            made.append(Result(values={"classes": listed}, mask=png(mask_image(mask))))
        return made

    def _boxes(self, outputs: Feed, places: Sequence[Placement | None]) -> list[Result]:
        found = detect(self._artifact, outputs, places)
        least = self._options.min_score
        return [Result(values={"boxes": boxes_json(named_boxes(self._artifact, shown(each, least)))}) for each in found]

    def _raw(self, outputs: Feed, places: Sequence[Placement | None]) -> list[Result]:
        arrays = {spec.name: _numbers(outputs[spec.name], spec) for spec in self._artifact.manifest.outputs}
        for name, array in arrays.items():
            if len(array) < len(places):
                raise DataError(f"{name!r} of {self._artifact.location} has {len(array)} rows for {len(places)} images")
        numbers = sum(array[0].size for array in arrays.values() if len(array))
        return [
            Result(values={"outputs": {name: array[row].tolist() for name, array in arrays.items()}}, numbers=numbers)
            for row in range(len(places))
        ]


def _numbers(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """The array in a dtype that JSON and Parquet have."""
    return array.astype(_WIDER.get(spec.dtype, spec.dtype), copy=False)


def cells(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a result in the columns of a table."""
    if kind == "raw":
        return dict(values["outputs"])
    if kind == "detect":
        boxes = values["boxes"]
        return {
            "classes": [each["class"] for each in boxes],
            "scores": [each["score"] for each in boxes],
            "boxes": [each["box"] for each in boxes],
        }
    name, key = ("probabilities", "probability") if kind == "classify" else ("shares", "share")
    found = {"classes": [each["class"] for each in values["classes"]], name: [each[key] for each in values["classes"]]}
    return found if kind == "classify" else {**found, "mask": values["mask"]}
