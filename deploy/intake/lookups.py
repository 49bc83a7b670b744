"""Which integers a module takes: those that it looks up have as many values as the table has rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_KEEPS = frozenset(
    [
        "long",
        "int",
        "short",
        "to",
        "type",
        "reshape",
        "view",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "permute",
        "transpose",
        "movedim",
        "contiguous",
        "clone",
        "detach",
        "expand",
        "expand_as",
        "repeat",
        "select",
        "narrow",
        "split",
        "chunk",
        "unbind",
        "__getitem__",
    ]
)
"""Functions whose result has the numbers of their first argument."""

_ALONG = frozenset(
    ["index_select", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_copy_"]
)
"""Functions of a table, a dimension and an index."""


class Lookups(TorchFunctionMode):
    """While it is active, `rows` collects the rows of the smallest table that each of `inputs` is an index into, by name.

    inputs: integer tensors by name; each has to be passed on as it is, or through functions that keep its numbers.
    """

    def __init__(self, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.rows: dict[str, int] = {}
        self._known = [(tensor, name) for name, tensor in inputs.items()]  # the tensors are held, so that no other gets their id

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        called = getattr(func, "__name__", "")
        for index, rows in _indexed(called, args, kwargs):
            if (name := self._name(index)) is not None and rows > 0:
                self.rows[name] = min(rows, self.rows.get(name, rows))
        result = func(*args, **kwargs)
        if called in _KEEPS and args and (name := self._name(args[0])) is not None:
            parts = result if isinstance(result, (tuple, list)) else [result]
            self._known += [(part, name) for part in parts if isinstance(part, torch.Tensor)]
        return result

    def _name(self, value: object) -> str | None:
        return next((name for tensor, name in self._known if tensor is value), None)


def _indexed(called: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Any, int]]:
    """The indices in a call, with the size of what they go into."""
    if called in ("embedding", "embedding_bag") and len(args) > 1 and isinstance(args[1], torch.Tensor):
        return [(args[0], args[1].shape[0])]
    if called == "one_hot":
        return [(args[0], args[1] if len(args) > 1 else kwargs.get("num_classes", -1))]
    if called in _ALONG and args:
        dim, index = (args[1] if len(args) > 1 else kwargs.get("dim")), (args[2] if len(args) > 2 else kwargs.get("index"))
        return [(index, args[0].shape[dim])] if isinstance(dim, int) and args[0].ndim else []
    if called == "__getitem__":
        places = args[1] if isinstance(args[1], tuple) else (args[1],)
        plain = all(isinstance(place, (int, slice, torch.Tensor)) for place in places) and len(places) <= args[0].ndim
        return list(zip(places, args[0].shape, strict=False)) if plain else []
    return []
