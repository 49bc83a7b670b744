"""Makes the array that a model takes of an image. It is part of the manifest; all commands use the same code.

The arithmetic is that of torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize` on a PIL image, without torch.
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from deploy.errors import DataError, UsageError

_LARGE = 10.0
"""Normalized pixels stay well below it."""

IMAGE_DTYPES = ("float32", "float16")
"""Those of an input that images are fed to."""

Size = int | tuple[int, int]

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes one model input, float32.

    resize: the shorter side in pixels (the longer in proportion), or (height, width); None leaves the size.
    crop: side of the centre square, or (height, width), zero-padded where the image is smaller; None leaves it whole.
    mean, std: one value a channel, on pixels times `scale`: `(pixel * scale - mean) / std`.
    channels: 3, or 1 for grey (ITU-R 601-2 luma, as PIL's mode "L").
    order: of the three channels, `rgb` or `bgr`; mean and std are in that order too.
    layout: `chw`, or `hwc` for models that take channels last.
    """

    resize: Size | None = None
    crop: Size | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 1 / 255
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bilinear"
    channels: Literal[1, 3] = 3
    order: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["chw", "hwc"] = "chw"

    def __post_init__(self) -> None:
        if isinstance(self.channels, bool) or self.channels not in (1, 3):
            raise UsageError(f"preprocess: channels must be 1 or 3, not {self.channels!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) == 3 and self.channels == 1 and len(set(values)) == 1:
                object.__setattr__(self, name, values[:1])  # the default, or one value for all
            elif len(values) != self.channels:
                raise UsageError(f"preprocess: {name} has {len(values)} values for {self.channels} channels")
            if not all(math.isfinite(value) for value in getattr(self, name)):
                raise UsageError(f"preprocess: {name} must be finite numbers, not {getattr(self, name)}")
        if any(value == 0 for value in self.std):
            raise UsageError("preprocess: std must not be 0")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UsageError(f"preprocess: scale must be more than 0, not {self.scale}")
        if self.interpolation not in tuple(INTERPOLATIONS):
            raise UsageError(
                f"preprocess: unknown interpolation {self.interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}"
            )
        if self.order not in ("rgb", "bgr"):
            raise UsageError(f"preprocess: order must be rgb or bgr, not {self.order!r}")
        if self.layout not in ("chw", "hwc"):
            raise UsageError(f"preprocess: layout must be chw or hwc, not {self.layout!r}")
        for name in ("resize", "crop"):
            size = getattr(self, name)
            if size is not None and min(_pair(size)) < 1:
                raise UsageError(f"preprocess: {name} must be 1 or more, not {size}")

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of every result, in the order of `layout`; None if images keep different sizes."""
        size = self.crop if self.crop is not None else self.resize if isinstance(self.resize, tuple) else None
        if size is None:
            return None
        height, width = _pair(size)
        return (self.channels, height, width) if self.layout == "chw" else (height, width, self.channels)

    def pixel_range(self) -> tuple[float, float] | None:
        """The range of what a network gets that takes raw pixels, such as 0 to 255; None where the numbers are about 1."""
        ends = [(pixel * self.scale - mean) / std for pixel in (0, 255) for mean, std in zip(self.mean, self.std, strict=True)]
        low, high = min(ends), max(ends)
        return (low, high) if max(abs(low), abs(high)) > _LARGE else None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Preprocess":
        """From the JSON form, in which every key is optional. Raises UsageError for an unknown key or a bad value."""
        known = {field.name for field in fields(cls)}
        unknown = [key for key in value if key not in known]
        if unknown:
            raise UsageError(f"preprocess: unknown {', '.join(map(repr, unknown))}; expected {', '.join(sorted(known))}")
        options = dict(value)
        try:
            for name in ("mean", "std"):
                if name in options:
                    numbers = options[name] if isinstance(options[name], list | tuple) else [options[name]]
                    options[name] = tuple(_number(number) for number in numbers)
            for name in ("resize", "crop"):
                if options.get(name) is not None:
                    options[name] = _size(options[name])
            if "scale" in options:
                name = "scale"
                options["scale"] = _number(options["scale"])
        except (TypeError, ValueError) as error:
            raise UsageError(f"preprocess: {name} is {value[name]!r}: {error}") from error
        channels = options.get("channels", 3)
        if channels == 1:  # defaults for grey
            options = {"mean": (0.0,), "std": (1.0,)} | options
        return cls(**options)

    @classmethod
    def load(cls, spec: str, size: tuple[int, int] | None) -> "Preprocess":
        """From a preset's name or a JSON file. `size` is the (height, width) of the input, None if it is dynamic.

        Raises UsageError.
        """
        if spec in PRESETS:
            return preset(spec, size)
        path = Path(spec)
        if not path.is_file():
            raise UsageError(f"unknown preprocess {spec!r}; expected {PRESET_NAMES} or a JSON file")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UsageError(f"{path} must hold a JSON object, not {type(value).__name__}")
        return cls.from_json(value)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(channels, height, width) float32, or (height, width, channels) with the layout `hwc`; no batch dimension.

        Transparency is dropped and an EXIF orientation is left as it is, as by torchvision's ImageFolder; of 16-bit grey
        pixels the high byte is taken, as Pillow does with 16-bit colour. Raises DataError for 32-bit pixels, whose range
        is unknown, and for colour spaces that Pillow cannot convert.
        """
        image = _eight_bit(image, "L" if self.channels == 1 else "RGB")
        if self.resize is not None:
            width, height = image.size
            target = _resized(height, width, self.resize)
            if target != (height, width):
                image = image.resize((target[1], target[0]), INTERPOLATIONS[self.interpolation])
        if self.crop is not None:
            image = _center_crop(image, *_pair(self.crop))
        pixels = np.asarray(image)
        planes = pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)
        if self.order == "bgr":
            planes = planes[::-1]
        result = np.empty(planes.shape, dtype=np.float32)
        result[...] = planes
        # A division, for pixel / 255 is what ToTensor rounds, and pixel * (1 / 255) may be its neighbour.
        result /= np.float32(1 / self.scale)
        result -= np.array(self.mean, dtype=np.float32)[:, None, None]
        result /= np.array(self.std, dtype=np.float32)[:, None, None]
        return result if self.layout == "chw" else np.ascontiguousarray(result.transpose(1, 2, 0))

    def open(self, source: Path | str | bytes) -> np.ndarray:
        """Read an image file, or its bytes, and preprocess it. Raises DataError with the name of the file."""
        name = "the image" if isinstance(source, bytes) else str(source)
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                image.load()
        except FileNotFoundError:
            raise DataError(f"no image at {name}") from None
        except UnidentifiedImageError:
            raise DataError(f"{name} is not an image that Pillow can read") from None
        except Exception as error:  # Pillow's decoders fail in many ways on damaged files
            raise DataError(f"{name} cannot be read: {error}") from error
        try:
            return self(image)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error


def preset(name: str, size: tuple[int, int] | None) -> Preprocess:
    """The preset `name` for inputs of `size` (height, width); its crop follows the input size.

    For a square crop the shorter side of the image is resized: for `imagenet` to 8/7 of the crop (256 for 224), for the
    others to the crop itself. For an oblong crop both sides are resized, so that no image is padded. If `size` is None
    (dynamic), `imagenet` takes 224 and the others do not resize.

    Raises UsageError for an unknown name.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preprocess {name!r}; expected one of {PRESET_NAMES}")
    base = PRESETS[name]
    if name == "imagenet":
        size = size or (224, 224)
    if size is None:
        return base
    height, width = (round(side * 256 / 224) if name == "imagenet" else side for side in size)
    if size[0] == size[1]:
        return replace(base, resize=height, crop=size[0])
    return replace(base, resize=(height, width), crop=size)


PRESETS = {
    # torchvision's ImageNet statistics, https://pytorch.org/vision/stable/models.html
    "imagenet": Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    # Mean and standard deviation of the 60,000 MNIST training images, as in PyTorch's MNIST example.
    "mnist": Preprocess(mean=(0.1307,), std=(0.3081,), channels=1),
    # Those of the 50,000 CIFAR-10 training images.
    "cifar10": Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    # Pixels scaled to 0..1.
    "none": Preprocess(),
}

PRESET_NAMES = ", ".join(PRESETS)
"""The names of the presets for help texts and errors."""


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    return float(value)


def _size(value: Any) -> Size:
    sides = value if isinstance(value, list | tuple) else [value]
    if len(sides) not in (1, 2) or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise ValueError("expected a number of pixels or [height, width]")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
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


def _resized(height: int, width: int, resize: Size) -> tuple[int, int]:
    """torchvision's `Resize`: the shorter side to `resize`, the longer truncated to whole pixels."""
    if not isinstance(resize, int):
        return resize
    short, long = min(height, width), max(height, width)
    scaled = int(resize * long / short)
    return (resize, scaled) if height <= width else (scaled, resize)


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """torchvision's `CenterCrop`, its rounding and its padding with zeros included."""
    if image.height < height or image.width < width:
        left, top = max((width - image.width) // 2, 0), max((height - image.height) // 2, 0)
        padded = Image.new(image.mode, (max(width, image.width), max(height, image.height)))
        padded.paste(image, (left, top))
        image = padded
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
