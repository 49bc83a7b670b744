"""The half-precision formats. Imports none of the libraries that convert to them."""

from typing import Literal, get_args

HalfPrecision = Literal["fp16", "bf16"]

PRECISIONS: tuple[HalfPrecision, ...] = get_args(HalfPrecision)


def half_precision(name: str) -> HalfPrecision:
    """`name` as one of the two; other formats do not come here."""
    return PRECISIONS[PRECISIONS.index(name)]


OPSET: dict[HalfPrecision, int] = {"fp16": 1, "bf16": 22}
"""The lowest opset that a graph may have: before 22, convolution and pooling are not defined for BF16."""

LARGEST: dict[HalfPrecision, float] = {"fp16": 65504.0, "bf16": (2 - 2**-7) * 2.0**127}
"""The largest finite number of each format."""

EPSILON: dict[HalfPrecision, float] = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""The largest relative rounding error of a normal number."""
