"""Masks beside images: `images/` and `masks/` in one folder, a PNG of class indices for each image, by the same path and stem."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from deploy.artifact.image_ops import picture_size, read_image
from deploy.data.image_folder import IMAGES, MASKS, images_under
from deploy.errors import DataError
from deploy.words import count_of, printable

_INDEXED = ("L", "P", "1", "I", "I;16", "I;16B")
"""Modes of Pillow whose pixels are numbers, not colours."""

_AHEAD = 64


def holds_masks(folder: Path) -> bool:
    """Whether `folder` has `images/` and `masks/`."""
    return (folder / IMAGES).is_dir() and (folder / MASKS).is_dir()


def read_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Every image with its mask, sorted. Raises DataError where an image has no mask, or a mask no image."""
    images = images_under(folder / IMAGES)
    masks = {path.relative_to(folder / MASKS).with_suffix(""): path for path in images_under(folder / MASKS)}
    pairs = []
    for image in images:
        name = image.relative_to(folder / IMAGES).with_suffix("")
        if name not in masks:
            raise DataError(f"{printable(image)} has no mask: expected {folder / MASKS / name.with_suffix('.png')}")
        pairs.append((image, masks.pop(name)))
    if masks:
        first = next(iter(masks.values()))
        raise DataError(f"{printable(first)} has no image in {folder / IMAGES}")
    if len({mask for _, mask in pairs}) < len(pairs):
        raise DataError(f"{folder / IMAGES} has two images of one name, and there is one mask of it")
    return pairs


def read_mask(path: Path) -> Image.Image:
    """The class indices of a PNG as an image of mode `L` or `I`. Raises DataError for a picture of colours."""
    image = read_image(path)
    if image.mode not in _INDEXED:
        raise DataError(f"{printable(path)} is a picture of mode {image.mode}; expected a PNG of class indices (mode L or P)")
    if image.mode == "P":
        return Image.fromarray(np.asarray(image, dtype=np.uint8))  # the indices, without the palette
    return image if image.mode == "L" else Image.fromarray(np.asarray(image).astype(np.int32))


def check_masks(pairs: Sequence[tuple[Path, Path]], classes: int | None, ignore: int) -> None:
    """Raise DataError for the first mask of another size than its image, or with a value that is no class and not `ignore`.

    classes: how many there are; None where that is not known.
    """
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(pairs), _AHEAD):
            for problem in pool.map(lambda pair: _problem(pair[0], pair[1], classes, ignore), pairs[start : start + _AHEAD]):
                if problem:
                    raise DataError(problem)


def _problem(image: Path, path: Path, classes: int | None, ignore: int) -> str:
    mask = read_mask(path)
    width, height, turned = picture_size(image)
    if mask.size not in ((width, height), turned):
        return f"{printable(path)} has {mask.width}x{mask.height} pixels, and {printable(image)} {width}x{height}"
    values = np.unique(np.asarray(mask))
    wrong = [int(value) for value in values if value != ignore and (value < 0 or (classes is not None and value >= classes))]
    if wrong:
        return (
            f"{printable(path)} has the value {', '.join(map(str, wrong[:5]))}; expected the indices of {count_of(classes or 0, 'class')},"
            f" 0 to {(classes or 0) - 1}, and {ignore} for what is to be ignored (`ignore_index`)"
        )
    return ""
