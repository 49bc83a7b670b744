"""Reads, turns, resizes, crops and pads images, as PIL images.

Resizing and cropping have torchvision's rounding, letterboxing that of Ultralytics' `LetterBox`.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deploy.errors import DataError
from deploy.words import printable

Fill = int | tuple[int, ...]
"""The colour of padding, 0 to 255: one number, or one a channel of the image."""

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
"""The values of the EXIF orientation that make an image's width its height."""


def read_image(source: Path | str | bytes) -> Image.Image:
    """The pixels of an image file, or of its bytes, as they are stored. Raises DataError with the name of the file."""
    name = image_name(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise DataError(f"no image at {name}") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image that Pillow can read") from None
    except Exception as error:  # Pillow's decoders fail in many ways on damaged files
        raise DataError(f"{name} cannot be read: {error}") from error


def picture_size(source: Path | str | bytes) -> tuple[int, int, tuple[int, int]]:
    """Width and height of an image as it is stored, and both as its EXIF orientation turns it; no pixel is decoded.

    Raises DataError.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            sideways = image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
            return image.width, image.height, image.size[::-1] if sideways else image.size
    except Exception as error:  # Pillow fails in many ways on damaged files
        raise DataError(f"{image_name(source)} cannot be read: {error}") from error


def image_name(source: Path | str | bytes) -> str:
    return "the image" if isinstance(source, bytes) else printable(source)


def upright(image: Image.Image) -> Image.Image:
    """The image turned and mirrored as its EXIF orientation says. Raises DataError where that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow fails in many ways on damaged EXIF data
        raise DataError(f"the EXIF orientation cannot be read: {error}") from error


def eight_bit(image: Image.Image, mode: str) -> Image.Image:
    """`image` in `mode`, L or RGB. Raises DataError."""
    # Pillow before 11.3 opens 16-bit grey PNG and PPM files as mode "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(f"32-bit pixels (mode {image.mode!r}) have no known range; convert the image to 8 bits a channel")
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; Pillow warns of the direct way
    try:
        return image.convert(mode)
    except ValueError as error:
        raise DataError(f"mode {image.mode!r} cannot be converted to {mode}; convert the image to RGB") from error


def resize(image: Image.Image, height: int, width: int, resampling: Image.Resampling) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), resampling)


def resize_shorter(image: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
    """torchvision's `Resize`: the shorter side to `side`, the longer in proportion, truncated to whole pixels."""
    return resize(image, *shorter_size(image.height, image.width, side), resampling)


def shorter_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The (height, width) that `resize_shorter` makes of an image of `height` x `width`."""
    scaled = int(side * max(height, width) / min(height, width))
    return (side, scaled) if height <= width else (scaled, side)


def letterbox(
    image: Image.Image, height: int, width: int, resampling: Image.Resampling, *, fill: Fill, centred: bool
) -> Image.Image:
    """The whole image, in proportion, as large as fits into `height` x `width`, and padding around it.

    centred: in the middle, with the odd pixel of padding below and on the right; else at the top left. Smaller images are
    enlarged. The rounding is that of `ultralytics.data.augment.LetterBox` with `auto=False`.
    """
    inner_height, inner_width, top, left = letterbox_place(image.height, image.width, height, width, centred=centred)
    return _padded(resize(image, inner_height, inner_width, resampling), height, width, top, left, fill)


def letterbox_place(image_height: int, image_width: int, height: int, width: int, *, centred: bool) -> tuple[int, int, int, int]:
    """The height and width of the image inside its letterbox, and the padding above and on the left of it."""
    ratio = min(height / image_height, width / image_width)
    inner_height = min(max(round(image_height * ratio), 1), height)
    inner_width = min(max(round(image_width * ratio), 1), width)
    top = round((height - inner_height) / 2 - 0.1) if centred else 0
    left = round((width - inner_width) / 2 - 0.1) if centred else 0
    return inner_height, inner_width, top, left


def center_crop(image: Image.Image, height: int, width: int, fill: Fill) -> Image.Image:
    """torchvision's `CenterCrop`, its rounding included, and its padding of smaller images, which is with zeros there."""
    (above, top), (before, left) = _crop_side(image.height, height), _crop_side(image.width, width)
    if image.height < height or image.width < width:
        image = _padded(image, max(height, image.height), max(width, image.width), above, before, fill)
    return image.crop((left, top, left + width, top + height))


def crop_place(size: int, wanted: int) -> int:
    """Where an image side of `size` pixels begins in the `wanted` pixels of `center_crop`; below 0 where that cuts it off."""
    before, cut = _crop_side(size, wanted)
    return before - cut


def _crop_side(size: int, wanted: int) -> tuple[int, int]:
    """Of one side: the padding before the image, and what is cut off before the padded image."""
    return max((wanted - size) // 2, 0), round((max(size, wanted) - wanted) / 2)


def _padded(image: Image.Image, height: int, width: int, top: int, left: int, fill: Fill) -> Image.Image:
    colour = fill if isinstance(fill, tuple) or len(image.getbands()) == 1 else (fill,) * len(image.getbands())
    canvas = Image.new(image.mode, (width, height), colour)
    canvas.paste(image, (left, top))
    return canvas
