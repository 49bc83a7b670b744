"""A check of images before they are decoded."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from deploy.errors import DataError


def check_image(data: bytes, most_pixels: int) -> None:
    """Raise DataError for what is no JPEG or PNG, and for one of more pixels than `most_pixels`; nothing is decoded for that."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise DataError(f"the image has too many pixels; {most_pixels:,} are the most that is taken") from None
    except UnidentifiedImageError:
        raise DataError("the body is neither a JPEG nor a PNG") from None
    except Exception as error:  # each of Pillow's decoders has its own way to fail on damaged files
        raise DataError(f"the image cannot be read: {error}") from error
    if width * height > most_pixels:
        raise DataError(f"the image has {width} x {height} pixels; {most_pixels:,} are the most that is taken")
