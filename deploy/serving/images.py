"""A check of images before they are decoded."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from deploy.errors import DataError


def check_image(data: bytes, most_pixels: int) -> None:
    """Raise DataError unless `data` is a JPEG or PNG of at most `most_pixels`. Only the header is read, and no pixel decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise DataError(f"the image has too many pixels; {most_pixels:,} are the most that is taken") from None
    except UnidentifiedImageError:
        raise DataError("the body is neither a JPEG nor a PNG") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files
        raise DataError(f"the image cannot be read: {error}") from error
    if width * height > most_pixels:
        raise DataError(f"the image has {width} x {height} pixels; {most_pixels:,} are the most that is taken")
