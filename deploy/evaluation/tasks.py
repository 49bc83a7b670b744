"""What a model is for, by its manifest: classifiers, segmenters and detectors."""

from typing import Literal

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import format_specs
from deploy.errors import UsageError
from deploy.evaluation.classifier import class_scores
from deploy.evaluation.detector import decode_of
from deploy.evaluation.segmenter import has_map, map_output

Task = Literal["classify", "segment", "detect"]


def form_of(artifact: Artifact) -> Task | None:
    """What the outputs have the form of; None for another model. Whether all else fits, `task_of` says."""
    outputs = artifact.manifest.outputs
    if artifact.manifest.decode is not None:
        return "detect"
    if len(outputs) == 1 and len(outputs[0].shape) == 2:
        return "classify"
    return "segment" if has_map(artifact) else None


def task_of(artifact: Artifact) -> Task:
    """A detector where the manifest says how its outputs become boxes, else by the form of the outputs. Raises UsageError."""
    if artifact.manifest.decode is not None:
        decode_of(artifact)
        return "detect"
    outputs = artifact.manifest.outputs
    if len(outputs) == 1 and len(outputs[0].shape) == 2:
        class_scores(artifact)
        return "classify"
    if any(len(spec.shape) in (3, 4) for spec in outputs):
        try:
            map_output(artifact)
        except UsageError as error:
            raise UsageError(f"{error}; a detector is exported with --decode") from error
        return "segment"
    raise UsageError(
        f"{artifact.location} gives {format_specs(outputs)}; expected one output of shape batch x classes, class maps, or a detector"
        " exported with --decode"
    )
