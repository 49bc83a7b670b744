"""Images in folders as feeds for a model: an ImageFolder has one folder of images for each class."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import file_digest, request_digest
from deploy.artifact.tensors import Feed
from deploy.calibration import imagefolder
from deploy.calibration.imagefolder import ImageFolder, ImageFolderError
from deploy.data.images import ImageInput, image_input
from deploy.errors import DataError, UsageError


def read_folder(folder: Path | str) -> ImageFolder:
    """The images under `folder`, with their classes. Raises DataError."""
    try:
        return imagefolder.scan(Path(folder))
    except ImageFolderError as error:
        raise DataError(str(error)) from error


def images_under(folder: Path) -> list[Path]:
    """The image files at any depth in `folder`, sorted. Raises DataError when there are none."""
    try:
        files = [file for file in imagefolder.walk(folder) if imagefolder.is_image(file)]
    except ImageFolderError as error:
        raise DataError(str(error)) from error
    if not files:
        raise DataError(f"{folder} holds no images")
    return files


def image_batches(
    source: ImageInput,
    samples: Sequence[tuple[Path, int]],
    batch_size: int,
    *,
    skip: Callable[[Path, Exception], None] | None = None,
) -> Iterator[tuple[Feed, np.ndarray]]:
    """Feeds and labels of `samples`, in order, in batches of `batch_size`; threads decode the images ahead of need.

    If the model's batch is fixed, the last feed is filled up with copies of its last image and has more rows than labels.
    Raises what `ImageInput.load` raises, unless `skip` takes the error, which leaves the image out; DataError for images
    of different sizes in one batch, and UsageError for a batch that does not fit into memory.
    """
    try:
        for images, labels in imagefolder.batches(samples, source.load, batch_size, skip=skip):
            if isinstance(source.spec.shape[0], int) and len(images) < batch_size:
                images = np.concatenate([images, np.repeat(images[-1:], batch_size - len(images), axis=0)])
            yield {source.spec.name: images.astype(source.spec.dtype, copy=False)}, labels
    except ImageFolderError as error:
        raise DataError(str(error)) from error
    except MemoryError as error:
        raise UsageError(f"a batch size of {batch_size} takes more memory than there is: {error}") from error


def image_feeds(artifact: Artifact, folder: Path | str, *, batch_size: int, count: int, seed: int = 0) -> Iterator[Feed]:
    """Feeds of `count` images of an ImageFolder, drawn at random evenly over its classes; all images if there are fewer.

    Every feed has `batch_size` images, or as many as the model's fixed batch; the last may be smaller. If the preprocessing
    leaves images in many sizes, a feed has one image. Raises UsageError when the artifact takes no images, and DataError
    for a folder that cannot be used; a DataError for an image comes when its feed is taken.
    """
    source = image_input(artifact)
    size, _ = source.batch_size(batch_size)
    if count < 1:
        raise UsageError(f"the number of images must be 1 or more, not {count}")
    samples = read_folder(folder).sample(count, seed)
    return (feed for feed, _ in image_batches(source, samples, size))


def data_digest(folder: Path, count: int) -> str:
    """SHA-256 over the `count` images of a folder that a stage uses, by class and content. Raises DataError."""
    samples = read_folder(folder).sample(count)
    return request_digest({"images": [[label, file_digest(path)] for path, label in samples]})
