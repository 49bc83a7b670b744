"""The image input of a model: from an image file to an array, by the preprocessing in the manifest."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.preprocess import IMAGE_DTYPES, PRESET_NAMES, Preprocess
from deploy.artifact.tensors import TensorSpec, format_shape, format_specs
from deploy.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """The image input of an artifact, with the preprocessing that makes it of an image file."""

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

    def batch_size(self, wanted: int) -> tuple[int, str]:
        """The batch size to use in place of `wanted`, and the reason if it is another, else "".

        Raises UsageError if `wanted` is below 1.
        """
        if wanted < 1:
            raise UsageError(f"the batch size must be 1 or more, not {wanted}")
        batch = self.spec.shape[0]
        if isinstance(batch, int):
            return batch, "" if batch == wanted else f"the model takes batches of {batch} only"
        if self.preprocess.shape is None and any(isinstance(dim, str) for dim in self.spec.shape[1:]):
            return 1, "" if wanted == 1 else "images go one by one, because the preprocessing leaves them in many sizes"
        return wanted, ""


def image_input(artifact: Artifact) -> ImageInput:
    """The image input of `artifact`. Raises UsageError if it has other inputs, or no preprocessing."""
    specs, preprocess = artifact.manifest.inputs, artifact.manifest.preprocess
    if len(specs) != 1 or len(specs[0].shape) != 4 or specs[0].dtype not in IMAGE_DTYPES:
        raise UsageError(
            f"{artifact.location} takes {format_specs(specs)}; images can be fed to a model with one input of four"
            f" dimensions, {' or '.join(IMAGE_DTYPES)}"
        )
    if preprocess is None:
        raise UsageError(
            f"{artifact.location} does not say how images become its input; export it with --preprocess ({PRESET_NAMES}"
            " or a JSON file)"
        )
    return ImageInput(spec=specs[0], preprocess=preprocess)
