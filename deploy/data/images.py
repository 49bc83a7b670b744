"""The image inputs of a model: from an image file to an array, by the preprocessing in the manifest."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.image_ops import image_name
from deploy.artifact.manifest import Manifest
from deploy.artifact.preprocess import IMAGE_DTYPES, PRESET_NAMES, Preprocess
from deploy.artifact.tensors import TensorSpec, format_shape, format_specs
from deploy.errors import UsageError, UserCodeError


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """An image input of an artifact, with the preprocessing that makes it of an image file."""

    spec: TensorSpec
    preprocess: Preprocess

    def load(self, source: Path | bytes) -> np.ndarray:
        """One preprocessed image, of a file or its bytes, without the batch dimension; float32, or as the user's function has it.

        Raises DataError with the name of a file that cannot be read, UsageError if the array does not fit the input, and
        UserCodeError if the user's function fails, or its array does not fit.
        """
        image = self.preprocess.open(source)
        if self.preprocess.function is not None:
            try:
                return self.fit(image)
            except UserCodeError as error:
                raise UserCodeError(f"{image_name(source)}: {error}") from error
        expected = self.spec.shape[1:]
        if any(isinstance(dim, int) and dim != size for dim, size in zip(expected, image.shape, strict=True)):
            raise UsageError(
                f"the preprocessing in the manifest makes {format_shape(image.shape)} of {image_name(source)}; the model takes"
                f" {self.spec}: export it with a --preprocess that fits"
            )
        return image

    @property
    def of_one_size(self) -> bool:
        """Whether all images become arrays of one size."""
        return self.preprocess.shape is not None or not any(isinstance(dim, str) for dim in self.spec.shape[1:])

    def fit(self, array: np.ndarray) -> np.ndarray:
        """What the user's function returned, without the batch. Raises UserCodeError for another shape or dtype than the input's, and
        for numbers that are not finite.

        For an input in half precision, float32 is taken too.
        """
        function = self.preprocess.function
        assert function is not None
        wanted = self.spec.shape
        image = array[0] if array.ndim == len(wanted) and array.shape[0] == 1 else array
        fits = image.ndim == len(wanted) - 1 and all(
            isinstance(dim, str) or dim == size for dim, size in zip(wanted[1:], image.shape, strict=True)
        )
        dtypes = {self.spec.dtype, "float32"} if self.spec.dtype == "float16" else {self.spec.dtype}
        if not fits or str(array.dtype) not in dtypes:
            raise UserCodeError(
                f"{function} returns {array.dtype} {format_shape(array.shape) or 'scalar'}{function.line(self.preprocess.folder)};"
                f" the model takes {self.spec}, without the batch or with a batch of 1"
            )
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise UserCodeError(
                f"{function} returns NaN or infinity{function.line(self.preprocess.folder)}; the model takes {self.spec}"
            )
        return image

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
    """The image input of `artifact`, which has no other inputs. Raises UsageError if it has, or no preprocessing.

    Runs no code of the user's.
    """
    found = image_inputs(artifact)
    if len(artifact.manifest.inputs) != 1:
        raise UsageError(_refusal(artifact))
    return found[0]


def image_inputs(artifact: Artifact) -> list[ImageInput]:
    """The image inputs of `artifact`, at least one: first that of the files themselves. Runs no code of the user's.

    Raises UsageError if it takes no images, or does not say which input they are, or has no preprocessing.
    """
    manifest = artifact.manifest
    first = _image(manifest)
    if first is None:
        raise UsageError(_refusal(artifact))
    if manifest.preprocess is None:
        raise UsageError(
            f"{artifact.location} does not say how images become its input; export it with --preprocess ({PRESET_NAMES},"
            " a JSON file, or a function of yours)"
        )
    specs = {spec.name: spec for spec in manifest.inputs}
    made = {first.name: manifest.preprocess, **manifest.other_images}
    return [ImageInput(spec=specs[name], preprocess=preprocess.within(artifact.path)) for name, preprocess in made.items()]


def takes_images(spec: TensorSpec) -> bool:
    """Whether images can be fed to an input."""
    return len(spec.shape) == 4 and spec.dtype in IMAGE_DTYPES


def _image(manifest: Manifest) -> TensorSpec | None:
    """The input that images are: the one that the manifest names, else the only one that they can be fed to.

    A function of the user's may make an input of any dtype and rank.
    """
    made = manifest.preprocess is not None and manifest.preprocess.function is not None
    chosen = manifest.inputs[0].name if len(manifest.inputs) == 1 else manifest.image
    able = [spec for spec in manifest.inputs if takes_images(spec) or (made and spec.shape and spec.name == chosen)]
    named = [spec for spec in able if manifest.image in (None, spec.name)]
    return named[0] if len(named) == 1 else None


def _refusal(artifact: Artifact) -> str:
    return (
        f"{artifact.location} takes {format_specs(artifact.manifest.inputs)}; images can be fed to a model with one input of four"
        f" dimensions, {' or '.join(IMAGE_DTYPES)}"
    )
