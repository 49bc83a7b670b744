"""Where a picture lies in the array that its preprocessing makes of it, and the way back for boxes and class maps."""

from dataclasses import dataclass

import numpy as np

from deploy.artifact.image_ops import crop_place, letterbox_place


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The picture's pixel edge `x` lies at `x * scale_x + left` in the array, and `y` at `y * scale_y + top`.

    width, height: of the picture. input_width, input_height: of the array.
    """

    width: int
    height: int
    input_width: int
    input_height: int
    scale_x: float
    scale_y: float
    left: int
    top: int

    def boxes_to_picture(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) as corners x1, y1, x2, y2, from pixels of the array to those of the picture, cut at its edges; float32."""
        shift = np.array([self.left, self.top] * 2, np.float64)
        scale = np.array([self.scale_x, self.scale_y] * 2, np.float64)
        most = np.array([self.width, self.height] * 2, np.float64)
        return np.clip((boxes - shift) / scale, 0, most).astype(np.float32)

    def map_to_picture(self, classes: np.ndarray, outside: int) -> np.ndarray:
        """A class map (h, w) over the whole array as one (height, width) of the picture, by the nearest pixel.

        outside: what stands where the preprocessing cut the picture off.
        """
        rows = _nearest(self.height, self.scale_y, self.top, self.input_height, classes.shape[0])
        columns = _nearest(self.width, self.scale_x, self.left, self.input_width, classes.shape[1])
        found: np.ndarray = classes[np.clip(rows, 0, None)[:, None], np.clip(columns, 0, None)[None]]
        found[rows < 0] = outside
        found[:, columns < 0] = outside
        return found


def place(
    width: int, height: int, resized: tuple[int, int] | None, letterbox: str | None, crop: tuple[int, int] | None
) -> Placement:
    """The placement of a picture that is resized to `resized` (height, width), and of that cropped to the centre `crop`.

    letterbox: `center` or `top-left`: `resized` is a letterbox with the picture there; None: it is stretched.
    """
    inner, shift, size = resized or (height, width), [0, 0], resized or (height, width)
    if resized is not None and letterbox is not None:
        *sides, top, left = letterbox_place(height, width, *resized, centred=letterbox == "center")
        inner, shift = (sides[0], sides[1]), [top, left]
    if crop is not None:
        shift = [start + crop_place(side, wanted) for start, side, wanted in zip(shift, size, crop, strict=True)]
        size = crop
    return Placement(
        width=width,
        height=height,
        input_width=size[1],
        input_height=size[0],
        scale_x=inner[1] / width,
        scale_y=inner[0] / height,
        left=shift[1],
        top=shift[0],
    )


def _nearest(count: int, scale: float, shift: int, size: int, cells: int) -> np.ndarray:
    """For each of `count` pixels of the picture, the cell of the map that its centre falls into; -1 outside of the array."""
    centres = (np.arange(count) + 0.5) * scale + shift
    inside = (centres >= 0) & (centres < size)
    return np.asarray(np.where(inside, np.minimum((centres * cells / size).astype(np.int64), cells - 1), -1))
