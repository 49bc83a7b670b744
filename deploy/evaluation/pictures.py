"""Pictures of predictions: masks as PNGs with a palette, and boxes drawn on the image."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deploy.artifact.decode import Detections
from deploy.artifact.image_ops import eight_bit, read_image, upright
from deploy.artifact.preprocess import Preprocess

OUTSIDE = 255
"""In a mask of a whole picture, the pixels that the preprocessing cut off."""

_OVERLAY = 0.55
_MARK = (255, 0, 255)
_SMALLEST_TEXT = 11


def _palette() -> np.ndarray:
    """The colours of classes, (256, 3) uint8: those of PASCAL VOC's development kit, with black for class 0."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        rest = index
        for shift in range(7, -1, -1):
            colours[index] |= np.array([(rest >> bit & 1) << shift for bit in range(3)], np.uint8)
            rest >>= 3
    return colours


PALETTE = _palette()


def mask_image(classes: np.ndarray) -> Image.Image:
    """A class map (height, width) as an image whose pixels are the indices: with a palette, or of 16 bits above 255 classes."""
    if classes.max(initial=0) > OUTSIDE:
        return Image.fromarray(classes.astype(np.uint16))
    image = Image.fromarray(classes.astype(np.uint8))
    image.putpalette(PALETTE.tobytes())
    return image


def png(image: Image.Image) -> bytes:
    """The image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def picture(source: Path | bytes, preprocess: Preprocess) -> Image.Image:
    """The image in colour, turned upright where the preprocessing turns it. Raises DataError."""
    image = read_image(source)
    return eight_bit(upright(image) if preprocess.exif_orientation else image, "RGB")


def overlaid(image: Image.Image, classes: np.ndarray) -> Image.Image:
    """The image with the colours of its class map laid over it; class 0 and what was cut off are left as they are."""
    colours = PALETTE[np.minimum(classes, OUTSIDE)].astype(np.float64)
    share = np.where((classes > 0) & (classes != OUTSIDE), _OVERLAY, 0.0)[..., None]
    return Image.fromarray((np.asarray(image) * (1 - share) + colours * share).astype(np.uint8))


def marked(image: Image.Image, where: np.ndarray) -> Image.Image:
    """The image in dim grey, with the pixels of `where` (height, width) bool in magenta."""
    grey = np.asarray(image.convert("L"))[..., None].repeat(3, axis=2) // 3
    return Image.fromarray(np.where(where[..., None], np.array(_MARK, np.uint8), grey))


def box_colour(label: int) -> tuple[int, ...]:
    """The colour of the boxes of a class: never black, nor that of what was cut off."""
    return tuple(int(part) for part in PALETTE[label % 254 + 1])


def boxed(image: Image.Image, found: Detections, names: Sequence[str]) -> Image.Image:
    """The image with boxes, and the class and score of each; names: of all classes, by index."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    size = max(_SMALLEST_TEXT, round(min(image.size) / 40))
    font = ImageFont.load_default(size)
    for box, score, label in zip(*found, strict=True):
        colour = box_colour(int(label))
        x1, y1, x2, y2 = (round(float(part)) for part in box)
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=colour, width=max(1, size // 8))
        text = f"{names[int(label)] if int(label) < len(names) else int(label)} {score:.0%}"
        left, top, right, bottom = draw.textbbox((x1, y1), text, font=font)
        height, width = bottom - top + 3, right - left + 4
        y = y1 - height if y1 >= height else y1
        x = max(0, min(x1, image.width - width))
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        ink = "black" if sum(colour) > 300 else "white"
        draw.text((x + 2 - (left - x1), y + 1 - (top - y1)), text, fill=ink, font=font)
    return image
