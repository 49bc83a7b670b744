"""Adaptive pooling to a fixed grid, in operators that are right at every size of a dynamic input.

The windows of `adaptive_avg_pool2d` depend on the size of its input. torch.export writes down those of the example's size, or, where
they overlap, does not come to an end. Cell `i` of `n` covers the rows from `floor(i H / n)` to `ceil((i + 1) H / n)` (PyTorch,
aten/src/ATen/native/AdaptivePooling.h): a comparison of two ranges, for each axis by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_AXES = {
    functional.adaptive_avg_pool1d: (1, "mean"),
    functional.adaptive_avg_pool2d: (2, "mean"),
    functional.adaptive_avg_pool3d: (3, "mean"),
    torch.adaptive_avg_pool1d: (1, "mean"),
    functional.adaptive_max_pool1d: (1, "max"),
    functional.adaptive_max_pool2d: (2, "max"),
    functional.adaptive_max_pool3d: (3, "max"),
}


class AdaptivePools(TorchFunctionMode):
    """While it is active, adaptive pooling of a dynamic axis to more than one cell is computed by masks of its windows."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _AXES and not kwargs.get("return_indices", False) and len(args) < 3:  # the third is return_indices
            count, kind = _AXES[func]
            x = args[0] if args else kwargs["input"]
            cells = args[1] if len(args) > 1 else kwargs["output_size"]
            cells = list(cells) if isinstance(cells, (tuple, list)) else [cells] * count
            axes = list(range(x.ndim - count, x.ndim))
            sizes = [x.shape[axis] if cell is None else cell for axis, cell in zip(axes, cells, strict=True)]
            if any(
                isinstance(x.shape[axis], torch.SymInt) and cell not in (None, 1) for axis, cell in zip(axes, cells, strict=True)
            ):
                for axis, cell, size in zip(axes, cells, sizes, strict=True):
                    if cell is not None:
                        x = _pool(x, axis, size, kind)
                return x
        return func(*args, **kwargs)


def _pool(x: torch.Tensor, axis: int, cells: int, kind: str) -> torch.Tensor:
    size = x.shape[axis]
    if cells == 1:
        return x.mean(axis, keepdim=True) if kind == "mean" else x.amax(axis, keepdim=True)
    cell = torch.arange(cells, device=x.device).unsqueeze(1)
    place = torch.arange(size, device=x.device).unsqueeze(0)
    start = torch.div(cell * size, cells, rounding_mode="floor")
    end = torch.div((cell + 1) * size + (cells - 1), cells, rounding_mode="floor")
    inside = (place >= start) & (place < end)  # cells x size
    x = x.movedim(axis, -1)
    if kind == "mean":
        share = inside.to(x.dtype)
        return (x @ (share / share.sum(1, keepdim=True)).T).movedim(-1, axis)
    lowest = torch.full((), float("-inf"), dtype=x.dtype, device=x.device)
    return torch.where(inside, x.unsqueeze(-2), lowest).amax(-1).movedim(-1, axis)
