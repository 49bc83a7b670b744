"""Segmenters: the output that is read as class maps, and the maps of its numbers."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.artifact.placement import Placement
from deploy.artifact.tensors import TensorSpec, format_specs
from deploy.errors import UsageError
from deploy.evaluation.classifier import class_name
from deploy.evaluation.pictures import OUTSIDE


def has_map(artifact: Artifact) -> bool:
    """Whether an output has the form of class maps."""
    return any(_is_map(spec, _axis(artifact)) for spec in artifact.manifest.outputs)


def map_output(artifact: Artifact) -> TensorSpec:
    """The first output that holds class maps: logits batch x classes x height x width, or indices batch [x 1] x height x width.

    Raises UsageError where there is none, or where there are class names, but not as many as classes.
    """
    found = next((spec for spec in artifact.manifest.outputs if _is_map(spec, _axis(artifact))), None)
    if found is None:
        raise UsageError(
            f"{artifact.location} gives {format_specs(artifact.manifest.outputs)}; expected logits batch x classes (2 or more) x height"
            " x width, or integers batch x height x width"
        )
    count, names = class_count(artifact, found), artifact.manifest.classes
    if count is not None and names is not None and count != len(names):
        raise UsageError(f"{artifact.location} has {count} classes and {len(names)} class names; export it with the right ones")
    return found


def class_count(artifact: Artifact, output: TensorSpec) -> int | None:
    """The number of classes of a map: by its logits, else by the class names; None where neither says."""
    names = artifact.manifest.classes
    size = output.shape[_axis(artifact)] if output.dtype.startswith("float") else None
    return size if isinstance(size, int) else len(names) if names is not None else None


def plane(artifact: Artifact, shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """(height, width) of images or maps of this shape, the batch first."""
    return shape[1:3] if _axis(artifact) == 3 and len(shape) == 4 and shape[1] != 1 else shape[-2:]


def class_maps(artifact: Artifact, array: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """The likeliest class of each pixel, (N, height, width) int64, of what `map_output` gives.

    size: (height, width) of the result, where the output may be smaller: logits are interpolated (bilinear, half-pixel centres,
    as PyTorch's `interpolate` does), indices repeated.
    """
    if array.dtype.kind == "f":
        logits = np.moveaxis(array, _axis(artifact), 1)
        if size is not None and logits.shape[2:] != size:
            logits = np.stack([[_resized(plane, size, Image.Resampling.BILINEAR) for plane in each] for each in logits])
        return np.asarray(logits.argmax(axis=1))
    maps = array.reshape(len(array), *array.shape[-2:]).astype(np.int64)
    if size is not None and maps.shape[1:] != size:
        maps = np.stack([_resized(each.astype(np.int32), size, Image.Resampling.NEAREST) for each in maps]).astype(np.int64)
    return maps


def _resized(plane: np.ndarray, size: tuple[int, int], resampling: Image.Resampling) -> np.ndarray:
    plane = plane.astype(np.float32) if plane.dtype.kind == "f" else plane
    return np.asarray(Image.fromarray(plane).resize(size[::-1], resampling))


def _axis(artifact: Artifact) -> int:
    """The axis of the classes: the last where images have their channels last."""
    preprocess = artifact.manifest.preprocess
    return 3 if preprocess is not None and preprocess.layout == "hwc" else 1


def _is_map(spec: TensorSpec, axis: int) -> bool:
    if spec.dtype.startswith("float"):
        return len(spec.shape) == 4 and spec.shape[axis] != 1
    return spec.dtype != "bool" and (len(spec.shape) == 3 or (len(spec.shape) == 4 and spec.shape[1] == 1))


def picture_map(
    artifact: Artifact, results: Mapping[str, np.ndarray], row: int, placement: Placement, outside: int
) -> np.ndarray:
    """The class map of one row in the size of its picture, (height, width) int64; `outside` where that was cut off."""
    array = results[map_output(artifact).name][row : row + 1]
    (found,) = class_maps(artifact, array, (placement.input_height, placement.input_width))
    return placement.map_to_picture(found, outside)


def shares(artifact: Artifact, mask: np.ndarray) -> tuple[tuple[str, float], ...]:
    """The classes in a mask, the largest first, with their shares of the pixels that the model saw."""
    seen = mask[mask != OUTSIDE]
    indices, counts = np.unique(seen, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return tuple((class_name(artifact, int(indices[each])), float(counts[each] / max(seen.size, 1))) for each in order)
