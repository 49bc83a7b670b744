"""Images in folders as feeds for a model: an ImageFolder has one folder of images for each class."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import file_digest, request_digest
from deploy.artifact.tensors import Feed
from deploy.calibration import imagefolder
from deploy.calibration.imagefolder import ImageFolder, ImageFolderError
from deploy.data.records import RecordInput, record_input
from deploy.data.table import FILE_NAME, find_table, normal, read_table
from deploy.errors import DataError, UsageError
from deploy.words import as_utf8

IMAGES, MASKS = "images", "masks"
"""The folders of images with a mask each."""


def read_folder(folder: Path | str) -> ImageFolder:
    """The images under `folder`, with their classes. Raises DataError."""
    try:
        return imagefolder.scan(Path(folder))
    except ImageFolderError as error:
        raise DataError(str(error)) from error


def read_images(folder: Path | str) -> ImageFolder:
    """The images under `folder` where no labels are needed: of an ImageFolder by class, else all of them as one class, "".

    Those of `images/` where that lies beside `masks/` or a JSON of boxes, and those in the folder itself where it has no folders.
    `root` is where a table would be. Raises DataError.
    """
    folder = Path(folder)
    inner = folder / IMAGES
    if inner.is_dir() and ((folder / MASKS).is_dir() or any(folder.glob("*.json"))):
        folder = inner
    elif not folder.is_dir() or any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        return read_folder(folder)
    files = images_under(folder)
    return ImageFolder(root=folder, classes=("",), samples=tuple((file, 0) for file in files), ignored=0)


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
    source: RecordInput,
    samples: Sequence[tuple[Path, int]],
    batch_size: int,
    *,
    skip: Callable[[Path, Exception], None] | None = None,
) -> Iterator[tuple[Feed, np.ndarray]]:
    """Feeds and labels of `samples`, in order, in batches of `batch_size`; threads decode the images ahead of need.

    If the model's batch is fixed, the last feed is filled up with copies of its last image and has more rows than labels.
    Raises what `RecordInput.load` raises, unless `skip` takes the error, which leaves the image out; DataError for images
    of different sizes in one batch, UsageError for a batch that does not fit into memory, and UserCodeError for a function
    that cannot be imported.
    """
    for image in source.images:
        image.preprocess.load_function()
    try:
        fixed = isinstance(source.specs[0].shape[0], int)
        for feed, labels in imagefolder.batches(samples, source.load, batch_size, skip=skip):
            yield (_filled(feed, batch_size) if fixed else feed), labels
    except ImageFolderError as error:
        raise DataError(str(error)) from error
    except MemoryError as error:
        raise UsageError(f"a batch size of {batch_size} takes more memory than there is: {error}") from error


def _filled(feed: Feed, rows: int) -> Feed:
    """`feed` with `rows` rows, the last one repeated."""
    return {name: array[np.minimum(np.arange(rows), len(array) - 1)] for name, array in feed.items()}


def image_feeds(artifact: Artifact, folder: Path | str, *, batch_size: int, count: int, seed: int = 0) -> Iterator[Feed]:
    """Feeds of `count` images of a folder, drawn at random evenly over its classes; all images if there are fewer.

    Every feed has `batch_size` images, or as many as the model's fixed batch; the last may be smaller. If the preprocessing
    leaves images in many sizes, a feed has one image. Raises UsageError when the artifact takes no images, and DataError
    for a folder that cannot be used; a DataError for an image comes when its feed is taken.
    """
    images = read_images(folder)
    source = record_input(artifact, [images.root])
    size, _ = source.batch_size(batch_size)
    if count < 1:
        raise UsageError(f"the number of images must be 1 or more, not {count}")
    samples = images.sample(count, seed)
    return (feed for feed, _ in image_batches(source, samples, size))


def data_digest(folder: Path, count: int, *, table: bool = False) -> str:
    """SHA-256 over the `count` images of a folder that a stage uses, by class and content, with `table` over theirs too.

    Raises DataError.
    """
    images = read_images(folder)
    return samples_digest(images.sample(count), images.root if table else None)


def samples_digest(samples: Sequence[tuple[Path, int]], folder: Path | None) -> str:
    """SHA-256 over images, by class and content; `folder`: that of the table which is read with them. Raises DataError."""
    content: dict[str, object] = {"images": [[label, file_digest(path)] for path, label in samples]}
    if folder is not None:  # rows belong to images by name
        content["names"] = [as_utf8(path.relative_to(folder)) for path, _ in samples]
        content["table"] = [file_digest(path) for path in table_files(folder, [path for path, _ in samples])]
    return request_digest(content)


def table_files(folder: Path, images: Sequence[Path]) -> list[Path]:
    """The table in `folder`, if there is one, and the further images that it names in the rows of `images`. Raises DataError."""
    path = find_table(folder)
    if path is None:
        return []
    rows = read_table(path).rows
    cells = [cell for image in images for name, cell in rows.get(normal(image), {}).items() if name != FILE_NAME]
    named = [folder / cell for cell in cells if isinstance(cell, str) and imagefolder.is_image(Path(cell))]
    return [path, *(image for image in named if image.is_file())]
