"""Images as feeds: what an artifact with one image input takes, from files, by the preprocessing in its manifest."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import file_digest, request_digest
from deploy.artifact.preprocess import PRESET_NAMES, Preprocess
from deploy.artifact.tensors import Feed, TensorSpec, format_shape
from deploy.calibration import imagefolder
from deploy.calibration.imagefolder import ImageFolder, ImageFolderError
from deploy.errors import DataError, UsageError


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """The one image input of an artifact, and how it is made of an image file."""

    spec: TensorSpec
    preprocess: Preprocess

    def load(self, path: Path) -> np.ndarray:
        """One preprocessed image, float32, without the batch dimension.

        Raises DataError naming the file when it cannot be read, UsageError when the array does not fit the input.
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
        """The batch size to use where `wanted` was asked for, and why it is another (else "").

        Raises UsageError when `wanted` is not 1 or more.
        """
        if wanted < 1:
            raise UsageError(f"the batch size must be 1 or more, not {wanted}")
        batch = self.spec.shape[0]
        if isinstance(batch, int):
            return batch, "" if batch == wanted else f"the model takes batches of {batch} only"
        if self.preprocess.shape is None and any(isinstance(dim, str) for dim in self.spec.shape[1:]):
            return 1, "" if wanted == 1 else "images go one by one, for the preprocessing leaves them in many sizes"
        return wanted, ""

    def batches(
        self,
        samples: Sequence[tuple[Path, int]],
        batch_size: int,
        *,
        skip: Callable[[Path, Exception], None] | None = None,
    ) -> Iterator[tuple[Feed, np.ndarray]]:
        """Feeds and labels of `samples`, in order, in batches of `batch_size`, decoded in threads ahead of need.

        The last feed is filled up with copies of its last image where the model's batch is fixed: there are then fewer
        labels than rows. Raises as `load` does, unless `skip` takes the error and leaves the image out.
        """
        for images, labels in _data_errors(imagefolder.batches(samples, self.load, batch_size, skip=skip)):
            if isinstance(self.spec.shape[0], int) and len(images) < batch_size:
                images = np.concatenate([images, np.repeat(images[-1:], batch_size - len(images), axis=0)])
            yield {self.spec.name: images.astype(self.spec.dtype, copy=False)}, labels


def image_input(artifact: Artifact) -> ImageInput:
    """The image input of `artifact`. Raises UsageError when it has another sort of input, or no preprocessing."""
    specs, preprocess = artifact.manifest.inputs, artifact.manifest.preprocess
    if len(specs) != 1 or len(specs[0].shape) != 4 or specs[0].dtype not in ("float32", "float16"):
        raise UsageError(
            f"{artifact.location} takes {', '.join(map(str, specs))}; images can be fed to a model with one input of four"
            " dimensions, float32 or float16"
        )
    if preprocess is None:
        raise UsageError(
            f"{artifact.location} does not say how images become its input; export it with --preprocess ({PRESET_NAMES}"
            " or a JSON file)"
        )
    return ImageInput(spec=specs[0], preprocess=preprocess)


def image_feeds(artifact: Artifact, folder: Path | str, *, batch_size: int, count: int, seed: int = 0) -> Iterator[Feed]:
    """Feeds of `count` images of an ImageFolder, drawn at random evenly over its classes (fewer where it holds fewer).

    All feeds have `batch_size` images, or the model's own fixed batch, but the last, which may be smaller; one image
    where the preprocessing leaves images in many sizes. Raises UsageError when the artifact takes no images, DataError
    for a folder or an image that cannot be used; the images are read, and complained of, as the feeds are taken.
    """
    source = image_input(artifact)
    size, _ = source.batch_size(batch_size)
    if count < 1:
        raise UsageError(f"the number of images must be 1 or more, not {count}")
    samples = read_folder(folder).sample(count, seed)
    return (feed for feed, _ in source.batches(samples, size))


def read_folder(folder: Path | str) -> ImageFolder:
    """The images under `folder`, one folder a class. Raises DataError."""
    try:
        return imagefolder.scan(Path(folder))
    except ImageFolderError as error:
        raise DataError(str(error)) from error


def _data_errors(
    stream: Iterator[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    try:
        yield from stream
    except ImageFolderError as error:
        raise DataError(str(error)) from error


def data_digest(folder: Path, count: int) -> str:
    """SHA-256 over the `count` images of a folder that a stage uses, by class and content. Raises DataError."""
    samples = read_folder(folder).sample(count)
    return request_digest({"images": [[label, file_digest(path)] for path, label in samples]})
