"""The image inputs of a model: from an image file to an array, by the preprocessing in the manifest."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Manifest
from deploy.artifact.preprocess import PRESET_NAMES, Preprocess
from deploy.artifact.tensors import TensorSpec, format_shape, format_specs
from deploy.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """An image input of an artifact, with the preprocessing that makes it of an image file."""

    spec: TensorSpec
    preprocess: Preprocess

    def load(self, path: Path) -> np.ndarray:
        """One preprocessed image, float32, without the batch dimension.

        Raises DataError with the name of a file that cannot be read, UsageError if the array does not fit the input.
        """
        image = self.preprocess.open(path)
        expected = self.spec.shape[1:]
        if any(isinstance(dim, int) and dim != size for dim, size in zip(expected, image.shape, strict=True)):
            raise UsageError(
                f"the preprocessing in the manifest makes {format_shape(image.shape)} of {path}; the model takes"
                f" {self.spec}: export it with a --preprocess that fits"
            )
        return image

    @property
    def of_one_size(self) -> bool:
        """Whether all images become arrays of one size."""
        return self.preprocess.shape is not None or not any(isinstance(dim, str) for dim in self.spec.shape[1:])

    def batch_size(self, wanted: int) -> tuple[int, str]:
        """The batch size to use in place of `wanted`, and the reason if it is another, else "".

        Raises UsageError if `wanted` is below 1.
        """
        return batch_size(self.spec, wanted, "" if self.of_one_size else "the preprocessing leaves them in many sizes")


def batch_size(spec: TensorSpec, wanted: int, singly: str) -> tuple[int, str]:
    """The batch size to use in place of `wanted` for an input, and the reason if it is another, else "".

    singly: why images go one by one, or "". Raises UsageError if `wanted` is below 1.
    """
    if wanted < 1:
        raise UsageError(f"the batch size must be 1 or more, not {wanted}")
    batch = spec.shape[0]
    if isinstance(batch, int):
        return batch, "" if batch == wanted else f"the model takes batches of {batch} only"
    if singly:
        return 1, "" if wanted == 1 else f"images go one by one, because {singly}"
    return wanted, ""


def image_input(artifact: Artifact) -> ImageInput:
    """The image input of `artifact`, which has no other inputs. Raises UsageError if it has, or no preprocessing."""
    found = image_inputs(artifact)
    if len(artifact.manifest.inputs) != 1:
        raise UsageError(_refusal(artifact))
    return found[0]


def image_inputs(artifact: Artifact) -> list[ImageInput]:
    """The image inputs of `artifact`, at least one: first that of the files themselves.

    Raises UsageError if it takes no images, or does not say which input they are, or has no preprocessing.
    """
    manifest = artifact.manifest
    first = _image(manifest)
    if first is None:
        raise UsageError(_refusal(artifact))
    if manifest.preprocess is None:
        raise UsageError(
            f"{artifact.location} does not say how images become its input; export it with --preprocess ({PRESET_NAMES}"
            " or a JSON file)"
        )
    specs = {spec.name: spec for spec in manifest.inputs}
    made = {first.name: manifest.preprocess, **manifest.other_images}
    return [ImageInput(spec=specs[name], preprocess=preprocess) for name, preprocess in made.items()]


def takes_images(spec: TensorSpec) -> bool:
    """Whether images can be fed to an input."""
    return len(spec.shape) == 4 and spec.dtype in ("float32", "float16")


def _image(manifest: Manifest) -> TensorSpec | None:
    """The input that images are: the one that the manifest names, else the only one that they can be fed to."""
    able = [spec for spec in manifest.inputs if takes_images(spec)]
    named = [spec for spec in able if manifest.image in (None, spec.name)]
    return named[0] if len(named) == 1 else None


def _refusal(artifact: Artifact) -> str:
    return (
        f"{artifact.location} takes {format_specs(artifact.manifest.inputs)}; images can be fed to a model with one input of four"
        " dimensions, float32 or float16"
    )
