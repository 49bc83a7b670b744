"""The formats of 8 bits that weights and activations are quantized to: codes, whose numbers are those times a scale.

Both are symmetric: the zero point is 0, and the largest magnitude of a tensor is `largest` times its scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from deploy.errors import PrecisionError

CodesName = Literal["int8", "fp8"]

_DEAD = 2.0**-14
"""The scale of a channel of zeros. Any scale would do; this one is a normal number in FP16 too."""

_FP8_SMALLEST = 2.0**-6
"""The smallest normal number of E4M3."""

_FP8_BITS = 3
"""Bits of its mantissa."""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A format of codes.

    name: as in `Manifest.precision`. dtype: what ONNX stores. largest: the largest code of a weight. lowest: the smallest code of
        an activation.
    slack: how many times larger than needed a scale may be at no loss that counts: 1 where all steps are equal.
    round_codes: scaled numbers (float32) to codes, in float32, in place. spacing: the distance between the codes around given ones
        (float32).
    """

    name: CodesName
    dtype: ir.DataType
    largest: float
    lowest: float
    slack: float
    round_codes: Callable[[np.ndarray], np.ndarray]
    spacing: Callable[[np.ndarray], np.ndarray]

    @property
    def label(self) -> str:
        """`INT8` or `FP8`."""
        return self.name.upper()

    def scale_of(self, amax: float) -> float:
        """The scale, a float32 number, at which `amax` is the largest number that the codes hold: amax / largest, TensorRT's rule.

        1 for a tensor that was always 0: any scale represents it.
        """
        scale = float(np.float32(amax / self.largest))
        return max(scale, float(np.finfo(np.float32).tiny)) if amax > 0 else 1.0

    def quantize_weight(
        self, weight: np.ndarray, axis: int | None, floor: float | np.ndarray = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Quantize `weight` (floating point, any shape): codes of the same shape, in the numpy type of `dtype`, and float32 scales.

        The scales have shape (C,), where C is the size of `axis`, or () without an axis. A scale is the largest magnitude divided
        by `largest`, and at least `floor` (one number, or one for each index of `axis`). Codes are rounded half to even. Raises
        PrecisionError for weights that are not finite.
        """
        array = np.asarray(weight, dtype=np.float32)
        others = None if axis is None else tuple(other for other in range(array.ndim) if other != axis % array.ndim)
        amax = np.maximum(array.max(axis=others, initial=0.0), -array.min(axis=others, initial=0.0))
        if not np.isfinite(amax).all():
            raise PrecisionError("a weight has NaN or infinity: it cannot be quantized")
        least = np.maximum(floor, np.finfo(np.float32).tiny)
        scale = np.maximum(np.where(amax > 0, amax / np.float32(self.largest), _DEAD), least).astype(np.float32)
        codes = array / (scale if others is None else np.expand_dims(scale, others))
        np.clip(self.round_codes(codes), -self.largest, self.largest, out=codes)
        return codes.astype(self.dtype.numpy()), scale

    def read_back(self, exact: np.ndarray, scale: float) -> np.ndarray:
        """An activation (float32, any shape) after quantization and back."""
        step = np.float32(scale)
        codes: np.ndarray = np.divide(exact, step)
        np.clip(codes, self.lowest, self.largest, out=codes)
        codes = self.round_codes(codes)
        codes *= step
        return codes


def _to_whole(scaled: np.ndarray) -> np.ndarray:
    np.rint(scaled, out=scaled)
    return scaled


def _to_e4m3(scaled: np.ndarray) -> np.ndarray:
    np.clip(scaled, -448, 448, out=scaled)  # ml_dtypes makes NaN of what is larger, the operators of ONNX do not
    scaled[...] = scaled.astype(ml_dtypes.float8_e4m3fn)
    return scaled


def _e4m3_spacing(codes: np.ndarray) -> np.ndarray:
    _, exponents = np.frexp(np.maximum(np.abs(codes), _FP8_SMALLEST))
    return np.asarray(np.ldexp(np.float32(1), exponents - 1 - _FP8_BITS))


INT8 = Codes(
    name="int8",
    dtype=ir.DataType.INT8,
    largest=127,
    lowest=-128,
    slack=1.0,
    round_codes=_to_whole,
    spacing=np.ones_like,
)
"""Whole numbers. -128 is not used for weights, so that their codes are symmetric, as TensorRT expects."""

FP8 = Codes(
    name="fp8",
    dtype=ir.DataType.FLOAT8E4M3FN,
    largest=448,
    lowest=-448,
    slack=2.0**6,
    round_codes=_to_e4m3,
    spacing=_e4m3_spacing,
)
"""E4M3 without infinities: 4 bits of exponent, 3 of mantissa (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433).

Of a scale that is 64 times too large, codes up to 7 are left, and numbers of a hundredth of that still have all bits.
"""

CODES: dict[CodesName, Codes] = {codes.name: codes for codes in (INT8, FP8)}
