"""The weights of an artifact in a safetensors file, including tensors that share memory, which safetensors does not support."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deploy.errors import CheckpointError
from deploy.words import a_type

_ALIASES = "aliases"


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the state_dict of `module` as safetensors, to be read by `load_saved`. Identical tensors are written once.

    The file depends only on names and values. Raises CheckpointError for a value that safetensors cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    storages = set()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name!r} of {type(module).__name__} is {a_type(value)}: only tensors can be saved")
        if is_lazy(value) or value.is_meta:
            raise CheckpointError(f"{name!r} of {type(module).__name__} has no values yet: run the module once, or load weights")
        tensor = value.detach().cpu().contiguous()
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor  # a view: safetensors wants separate memory
        storages.add(storage)
    # One entry only, because safetensors writes several in no fixed order.
    metadata = {_ALIASES: json.dumps(aliases, sort_keys=True)} if aliases else None
    try:
        safetensors.torch.save_file(tensors, path, metadata=metadata)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"cannot save the weights of {type(module).__name__} as {path.name}: {error}") from error


def load_saved(module: nn.Module, path: Path) -> None:
    """Load a file of `save_weights`, strictly. Raises CheckpointError if it is damaged or belongs to another module."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            aliases = json.loads((file.metadata() or {}).get(_ALIASES, "{}"))
        state = OrderedDict(safetensors.torch.load_file(path))
        state.update({name: state[kept] for name, kept in aliases.items()})
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    state._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]  # the file has the current layout
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit the {type(module).__name__} that was rebuilt: {error}\n"
            "Was the library that defines it upgraded since the export? Export again"
        ) from error
