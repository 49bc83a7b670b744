"""Makes the array that a model takes of an image. It is part of the manifest; all commands use the same code.

The arithmetic is that of torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize` on a PIL image, without torch.
In place of all that, a function of the user's may make the array.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from deploy.artifact.image_ops import (
    Fill,
    center_crop,
    eight_bit,
    image_name,
    letterbox,
    read_image,
    resize,
    resize_shorter,
    shorter_size,
    upright,
)
from deploy.artifact.placement import Placement, place
from deploy.artifact.usercode import UserFunction
from deploy.errors import DataError, UsageError, UserCodeError
from deploy.words import a_type

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
    resize_mode: `shorter`, the default for one number; `stretch` to exactly (height, width), the default for two;
        `letterbox`: the whole image in proportion, padded to (height, width). One number is then a square.
    position: of the image in its letterbox, `center` or `top-left`.
    crop: side of the centre square, or (height, width), padded where the image is smaller; None leaves it whole.
    fill: the padding of letterbox and crop, 0 to 255: one number, or one a channel in the order of `order`.
    exif_orientation: turn the image upright first, as its EXIF orientation says. False leaves it as it is stored, which is
        what torchvision's ImageFolder and most training code do.
    mean, std: one value a channel, on pixels times `scale`: `(pixel * scale - mean) / std`.
    channels: 3, or 1 for grey (ITU-R 601-2 luma, as PIL's mode "L").
    order: of the three channels, `rgb` or `bgr`; mean and std are in that order too.
    layout: `chw`, or `hwc` for models that take channels last.
    function: makes the array of the PIL image, as it was read (and turned upright); of the rest, only `exif_orientation` goes
        with it. `Artifact.preprocess` knows where its file is.
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
    resize_mode: Literal["shorter", "stretch", "letterbox"] | None = None
    position: Literal["center", "top-left"] = "center"
    fill: int | tuple[int, ...] = 0
    exif_orientation: bool = False
    function: UserFunction | None = None

    def __post_init__(self) -> None:
        if self.function is not None:
            self._check_function()
            return
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
        self._check_padding()

    def _check_function(self) -> None:
        """Raise UsageError for what would have no effect beside a function."""
        defaults = {each.name: each.default for each in fields(self)} | {"function": self.function}
        defaults["exif_orientation"] = self.exif_orientation
        if other := [name for name, default in defaults.items() if getattr(self, name) != default]:
            raise UsageError(f"preprocess: {self.function} makes the whole array; leave out {', '.join(other)}")

    def _check_padding(self) -> None:
        if self.resize_mode not in (None, "shorter", "stretch", "letterbox"):
            raise UsageError(f"preprocess: resize_mode must be shorter, stretch or letterbox, not {self.resize_mode!r}")
        if self.resize_mode is not None and self.resize is None:
            raise UsageError(f"preprocess: resize_mode {self.resize_mode} needs resize, the size in pixels")
        if self.resize_mode == "shorter" and not isinstance(self.resize, int):
            raise UsageError(f"preprocess: resize_mode shorter takes one number as resize, not {self.resize}")
        if self.position not in ("center", "top-left"):
            raise UsageError(f"preprocess: position must be center or top-left, not {self.position!r}")
        if self.position != "center" and self.resize_mode != "letterbox":
            raise UsageError("preprocess: position is of resize_mode letterbox")
        fill = self.fill if isinstance(self.fill, tuple) else (self.fill,)
        if len(fill) not in (1, self.channels) or not all(type(each) is int and 0 <= each <= 255 for each in fill):
            raise UsageError(f"preprocess: fill must be a number of 0 to 255, or {self.channels} of them, not {self.fill!r}")
        if any(fill) and self.resize_mode != "letterbox" and self.crop is None:
            raise UsageError("preprocess: fill is the padding of resize_mode letterbox and of crop; there is neither")
        if not isinstance(self.exif_orientation, bool):
            raise UsageError(f"preprocess: exif_orientation must be true or false, not {self.exif_orientation!r}")

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every result; None if images keep different sizes, or a function makes them."""
        if self.crop is not None:
            return _pair(self.crop)
        if self.resize is None or (isinstance(self.resize, int) and self.resize_mode in (None, "shorter")):
            return None
        return _pair(self.resize)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of every result, in the order of `layout`; None if images keep different sizes."""
        if self.size is None:
            return None
        height, width = self.size
        return (self.channels, height, width) if self.layout == "chw" else (height, width, self.channels)

    def pixel_range(self) -> tuple[float, float] | None:
        """The range of what a network gets that takes raw pixels, such as 0 to 255; None where the numbers are about 1.

        None too where a function makes them.
        """
        if self.function is not None:
            return None
        ends = [(pixel * self.scale - mean) / std for pixel in (0, 255) for mean, std in zip(self.mean, self.std, strict=True)]
        low, high = min(ends), max(ends)
        return (low, high) if max(abs(low), abs(high)) > _LARGE else None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Preprocess":
        """From the JSON form, in which every key is optional. Raises UsageError for an unknown key or a bad value."""
        known = {field.name for field in fields(cls)} - {"function"}
        unknown = [key for key in value if key not in known and (key != "function" or value[key] is not None)]
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
            if isinstance(options.get("fill"), list):
                options["fill"] = tuple(options["fill"])
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
        """From a preset's name, a JSON file, or a function as `FILE.py:FUNCTION` or `pkg.mod:FUNCTION`.

        `size` is the (height, width) of the input, None if it is dynamic. Raises UsageError, and what `UserFunction.read` raises.
        """
        if spec in PRESETS:
            return preset(spec, size)
        path = Path(spec)
        if path.suffix == ".py":
            raise UsageError(f"{spec} is a Python file: name the function in it, {spec}:FUNCTION")
        if not path.is_file():
            if ":" in spec:
                return cls(function=UserFunction.read(spec))
            raise UsageError(
                f"unknown preprocess {spec!r}; expected {PRESET_NAMES}, or a JSON file, FILE.py:FUNCTION or pkg.mod:FUNCTION"
            )
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UsageError(f"{path} must hold a JSON object, not {type(value).__name__}")
        return cls.from_json(value)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def folder(self) -> Path | None:
        """Where the file of `function` lies; None where that is not known."""
        return None

    def within(self, folder: Path) -> "Preprocess":
        """The same, with the file of its function in `folder`; itself where it needs none."""
        if self.function is None or self.function.file is None:
            return self
        return _Placed(folder, self)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(channels, height, width) float32, or (height, width, channels) with the layout `hwc`; no batch dimension.

        Transparency is dropped, and an EXIF orientation is left as it is unless `exif_orientation`; of 16-bit grey pixels the
        high byte is taken, as Pillow does with 16-bit colour. Raises DataError for 32-bit pixels, whose range is unknown, and
        for colour spaces that Pillow cannot convert. With a function, what that returns, and what `UserFunction.call` raises.
        """
        if self.exif_orientation:
            image = upright(image)
        if self.function is not None:
            return self._user_array(self.function, image)
        pixels = np.asarray(
            self._sized(
                eight_bit(image, "L" if self.channels == 1 else "RGB"), INTERPOLATIONS[self.interpolation], self._colour()
            )
        )
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

    def _colour(self) -> Fill:
        fill = self.fill[::-1] if isinstance(self.fill, tuple) and self.order == "bgr" else self.fill
        return fill[0] if isinstance(fill, tuple) and len(fill) == 1 else fill

    def _sized(self, image: Image.Image, resampling: Image.Resampling, fill: Fill) -> Image.Image:
        if self.resize is not None:
            if self.resize_mode == "letterbox":
                centred = self.position == "center"
                image = letterbox(image, *_pair(self.resize), resampling, fill=fill, centred=centred)
            elif isinstance(self.resize, int) and self.resize_mode != "stretch":
                image = resize_shorter(image, self.resize, resampling)
            else:
                image = resize(image, *_pair(self.resize), resampling)
        return image if self.crop is None else center_crop(image, *_pair(self.crop), fill)

    def mask(self, mask: Image.Image, outside: int) -> np.ndarray:
        """A map of class indices of an image, resized (nearest pixel), cropped and padded as that is: (height, width) int64.

        outside: the padding. Raises UsageError where a function makes the array.
        """
        if self.function is not None:
            raise UsageError(
                f"{self.function} makes the array of an image, and a mask cannot follow it: give .npz feeds with masks"
            )
        return np.asarray(self._sized(mask, Image.Resampling.NEAREST, outside), dtype=np.int64)

    def placement(self, width: int, height: int) -> Placement:
        """Where an image of this size lies in its array. Raises UsageError where a function makes the array."""
        if self.function is not None:
            raise UsageError(f"{self.function} makes the array of an image, and boxes and masks do not find the way back from it")
        resized = None if self.resize is None else _pair(self.resize)
        if isinstance(self.resize, int) and self.resize_mode in (None, "shorter"):
            resized = shorter_size(height, width, self.resize)
        letterbox = self.position if self.resize_mode == "letterbox" else None
        return place(width, height, resized, letterbox, None if self.crop is None else _pair(self.crop))

    def _user_array(self, function: UserFunction, image: Image.Image) -> np.ndarray:
        if function.file is not None and self.folder is None:
            raise UsageError(f"{function} is in a file of an artifact: take the preprocessing from `Artifact.preprocess`")
        result = function.call(self.folder, image)
        if not isinstance(result, np.ndarray):
            raise UserCodeError(f"{function} returns {a_type(result)}{function.line(self.folder)}; expected a numpy array")
        return result

    def load_function(self) -> None:
        """Import the function, if there is one and it is known where it is: an error of this is not an image's.

        Raises what `UserFunction.load` raises.
        """
        if self.function is not None and (self.folder is not None or self.function.module is not None):
            self.function.load(self.folder)

    def open(self, source: Path | str | bytes) -> np.ndarray:
        """Read an image file, or its bytes, and preprocess it. Raises DataError, or UserCodeError, with the name of the file."""
        self.load_function()
        image = read_image(source)
        try:
            return self(image)
        except (DataError, UserCodeError) as error:
            raise type(error)(f"{image_name(source)}: {error}") from error


class _Placed(Preprocess):
    """With the folder of the function's file, which is no field: where an artifact lies is not written in its manifest."""

    __slots__ = ("_place",)  # msgspec writes what is in __dict__
    _place: Path

    def __init__(self, folder: Path, preprocess: Preprocess) -> None:
        super().__init__(**vars(preprocess))
        object.__setattr__(self, "_place", folder)

    @property
    def folder(self) -> Path:
        return self._place


def preset(name: str, size: tuple[int, int] | None) -> Preprocess:
    """The preset `name` for inputs of `size` (height, width); its crop follows the input size.

    For a square crop the shorter side of the image is resized: for `imagenet` to 8/7 of the crop (256 for 224), for the
    others to the crop itself. For an oblong crop both sides are resized, so that no image is padded. If `size` is None
    (dynamic), `imagenet` takes 224 and the others do not resize. `yolo` letterboxes to the size, or to 640x640.

    Raises UsageError for an unknown name.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preprocess {name!r}; expected one of {PRESET_NAMES}")
    base = PRESETS[name]
    if base.resize_mode == "letterbox":
        return replace(base, resize=size or base.resize)
    if name == "imagenet":
        size = size or (224, 224)
    if size is None:
        return base
    height, width = (round(side * 256 / 224) if name == "imagenet" else side for side in size)
    if size[0] == size[1]:
        return replace(base, resize=height, crop=size[0])
    return replace(base, resize=(height, width), crop=size)


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


PRESETS = {
    # torchvision's ImageNet statistics, https://pytorch.org/vision/stable/models.html
    "imagenet": Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    # Mean and standard deviation of the 60,000 MNIST training images, as in PyTorch's MNIST example.
    "mnist": Preprocess(mean=(0.1307,), std=(0.3081,), channels=1),
    # Those of the 50,000 CIFAR-10 training images.
    "cifar10": Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    # Pixels scaled to 0..1.
    "none": Preprocess(),
    # https://docs.ultralytics.com/reference/data/augment/#ultralytics.data.augment.LetterBox: grey of 114 around the centre.
    "yolo": Preprocess(resize=(640, 640), resize_mode="letterbox", fill=114),
}

PRESET_NAMES = ", ".join(PRESETS)
"""The names of the presets for help texts and errors."""
