"""Images in requests: checked before they are decoded, run through a model, and answered with classes, a mask or boxes."""

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from starlette.responses import Response

from deploy.artifact.artifact import Artifact
from deploy.artifact.placement import Placement
from deploy.artifact.tensors import Feed
from deploy.data.images import ImageInput, image_input
from deploy.errors import DataError, InputError, UsageError
from deploy.evaluation.detector import detect, named_boxes, placement_of
from deploy.evaluation.differences import shown
from deploy.evaluation.pictures import OUTSIDE, mask_image, png
from deploy.evaluation.segmenter import picture_map
from deploy.evaluation.tasks import Task, task_of
from deploy.serving.middleware import json_response
from deploy.serving.models import Served

_DOES = {"classify": "classifies no images", "segment": "segments no images", "detect": "finds no boxes in images"}


@dataclass(frozen=True)
class Ran:
    """An image in a request, and what a model gave for it in the first row of `results`."""

    used: Served
    results: Feed
    data: bytes

    @property
    def artifact(self) -> Artifact:
        return self.used.artifact

    def answer(self, content: Mapping[str, Any]) -> Response:
        """The response with `content` and the model's name and version."""
        return json_response({"model_name": self.used.source.name, "model_version": self.used.source.version, **content})

    def mask(self) -> tuple[np.ndarray, bytes]:
        """The class map in the size of the image, and the PNG of it."""
        found = picture_map(self.artifact, self.results, 0, self._placement(), OUTSIDE)
        return found, png(mask_image(found))

    def boxes(self, least: float) -> tuple[tuple[str, float, tuple[float, float, float, float]], ...]:
        """Class, score and corners of the boxes with a score of `least` or more."""
        (found,) = detect(self.artifact, self.results, [self._placement()])
        return named_boxes(self.artifact, shown(found, least))

    def _placement(self) -> Placement:
        return placement_of(image_input(self.artifact).preprocess, self.data)


def check_task(served: Served, task: Task) -> None:
    """Raise InputError for a model that is not for `task`, or takes something else than one image."""
    try:
        image_input(served.artifact)
        found = task_of(served.artifact)
    except UsageError as error:
        raise InputError(f"{served.source.name!r} {_DOES[task]}: {error}") from error
    if found != task:
        raise InputError(f"{served.source.name!r} {_DOES[task]}: it is for /{found}")


def image_feed(data: bytes, source: ImageInput, most_pixels: int) -> dict[str, np.ndarray]:
    """The input of an image, repeated where the model's batch is fixed. Raises DataError, and what `ImageInput.load` raises."""
    check_image(data, most_pixels)
    image = source.load(data)
    rows = source.spec.shape[0] if isinstance(source.spec.shape[0], int) else 1
    return {source.spec.name: np.repeat(image[None], rows, axis=0).astype(source.spec.dtype, copy=False)}


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
