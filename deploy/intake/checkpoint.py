"""Reading trained weights from a file, safely: nothing in a checkpoint is ever executed."""

import argparse
import errno
import pathlib
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from deploy.artifact.manifest import file_digest, request_digest
from deploy.errors import CheckpointError
from deploy.intake.fileformat import file_format, refuse_folder, refuse_shard, shard_files
from deploy.intake.fit import StateDict
from deploy.words import a_type, is_utf8

CONTAINERS = (
    "state_dict", "model_state_dict", "model", "net_state_dict", "net", "network", "module", "weights", "params",
    "state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema",
)  # fmt: skip
"""Keys that may hold the weights, in the order they are tried: trained weights before their moving average."""

_DEPTH = 30
"""Levels of keys that are searched for weights."""

_HARMLESS: list[Any] = [
    # Data that training loops save beside the weights, such as a metric or the options. Unpickling these types runs no code.
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    np.ndarray,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdSU"),
    # numpy 1 and 2 spell the module differently in their pickles.
    *(
        (value.__reduce__()[0], f"{package}.multiarray.{name}")
        for package in ("numpy.core", "numpy._core")
        for name, value in (("scalar", np.float64(0)), ("_reconstruct", np.zeros(1)))
    ),
]


def read_state_dict(path: Path) -> StateDict:
    """The weights in `path`, on the CPU. What the file is, its content tells: its name may be any.

    Formats: what torch.save writes (also of numpy arrays), read with `weights_only=True`; safetensors; `.npz`; an index of
    shards of these. The weights may be the whole file, or be at any depth of keys: `found_under` of the result is where, and
    `others` are the keys of other weights beside them.

    Raises CheckpointError for a file that is missing, truncated, no checkpoint, an archive of another kind, a pickle that
    would run code, one that holds no weights, or several sets of them that no key tells apart.
    """
    path = Path(path)
    if path.is_dir():
        refuse_folder(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    refuse_shard(path)
    state = _read_shards(path) if file_format(path) == "index" else _read_file(path)
    empty = next((name for name, tensor in state.items() if tensor.is_meta), None)
    if empty is not None:
        raise CheckpointError(
            f"{path} holds {empty!r} without values (on the meta device): save the weights of a module that has them"
        )
    for name, tensor in state.items():
        if tensor.layout is not torch.strided:  # sparse
            state[name] = tensor.to_dense()
    return state


def weights_digest(path: Path) -> str:
    """The SHA-256 of a file of weights; of an index of shards, together with these. Raises CheckpointError."""
    if file_format(path) != "index":
        return file_digest(path)
    return request_digest({"shards": [file_digest(file) for file in (path, *shard_files(path))]})


def _read_shards(index: Path) -> StateDict:
    tensors: dict[str, torch.Tensor] = {}
    for file, names in shard_files(index).items():
        shard = _read_file(file)
        lost = [name for name in names if name not in shard]
        if lost:
            raise CheckpointError(f"{file} lacks {lost[0]!r}, which {index.name} says is in it: copy the shards again")
        tensors.update(shard)
    return StateDict(tensors, path=index, ordered=False)


def _read_file(path: Path) -> StateDict:
    kind = file_format(path)
    if kind == "index":
        raise CheckpointError(f"{path} is an index of shards: expected a file of weights")
    if kind == "safetensors":
        try:
            # The reader takes the names of files in UTF-8 alone.
            tensors = safetensors.torch.load_file(path) if is_utf8(path) else safetensors.torch.load(path.read_bytes())
            return StateDict(tensors, path=path, ordered=False)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    content = _load_npz(path) if kind == "npz" else _load_pickle(path)
    key, weights, others = _find(content, path)
    metadata = getattr(weights, "_metadata", None)
    tensors = _named_tensors(weights)
    if "n_averaged" in tensors and all(name.startswith("module.") for name in tensors if name != "n_averaged"):
        del tensors["n_averaged"]  # the counter of torch.optim.swa_utils.AveragedModel
    return StateDict(tensors, path=path, found_under=key, others=others, metadata=metadata)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of numbers in the file; others, as of text, are no weights."""
    found: dict[str, np.ndarray] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                try:
                    array = arrays[name]
                except ValueError:
                    continue  # Python objects, which only a pickle that may run code could give
                if array.dtype.kind == "V":
                    raise CheckpointError(
                        f"{path} holds {name!r} as {array.dtype}, which is no type of numpy's: save it as float32"
                    )
                found[name] = array
    # zipfile and zlib have several kinds of errors for damaged bytes.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise CheckpointError(f"{path} is a damaged .npz file of numpy arrays: {error}") from error
    return found


def _load_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(?i).*sparse", UserWarning)  # that it is beta, and slow to check
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True)
            with path.open("rb") as file:  # torch.load takes the suffix, and not the content, for the format
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'>|type (<class '[\w.]+'>)", str(error))
        if culprit is None:
            raise CheckpointError(f"{path} is not a checkpoint: expected what torch.save writes, or .safetensors") from error
        raise CheckpointError(
            f"{path} is a pickle that would run code when loaded: it asks for {next(filter(None, culprit.groups()))}, and only"
            " tensors and plain values are read.\nIf you trust the file, convert it:"
            " torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW) for a whole module, or save the"
            " state_dict alone"
        ) from error
    except (OSError, EOFError) as error:
        with path.open("rb") as file:
            start = file.read(2)
        if not start or (
            start == b"PK" and getattr(error, "errno", None) in (None, errno.EINVAL)
        ):  # a zip archive without its end
            raise CheckpointError(f"{path} is {'truncated' if start else 'empty'}: copy it again") from error
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or repr(error)}") from error
    # The legacy reader raises many kinds of errors for damaged bytes: EOFError, KeyError, UnicodeDecodeError, struct.error, ...
    except Exception as error:
        reason = str(error).partition(". ")[0] or type(error).__name__
        if isinstance(error, KeyError | UnicodeDecodeError | AssertionError):
            reason = "its first bytes are not those of a checkpoint"
        raise CheckpointError(f"{path} is truncated, damaged or not a checkpoint: {reason}") from error


def _find(content: Any, path: Path) -> tuple[str, Mapping[Any, Any], tuple[str, ...]]:
    """The key of the weights ("" for the whole file), the weights, and the keys of other weights beside them."""
    likeness = _Likeness()
    if not likeness(content):
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds {a_type(content)}; expected a state_dict: save model.state_dict()")
        found = ", ".join(repr(key) for key in list(content)[:10]) or "nothing"
        raise CheckpointError(f"{path} holds no weights: expected tensors by name, found {found}")
    keys: list[str] = []
    others: tuple[str, ...] = ()
    while len(keys) <= _DEPTH:
        # Numbers beside the weights (a metric, a confusion matrix) are tensors too, but look less like weights.
        most = likeness(content)
        nested = {key: child for key, child in _children(content) if likeness(child) == most}
        known = [key for key in CONTAINERS if key in nested]
        if not known and _like_weights(_named_tensors(content)) == most:
            return ".".join(keys), content, others
        if not known and len(nested) > 1:
            sets = ", ".join(repr(".".join((*keys, key))) for key in nested)
            raise CheckpointError(f"{path} holds several sets of weights: {sets}; save the one you want to a separate file")
        key = known[0] if known else next(iter(nested))
        others = (*others, *(".".join((*keys, other)) for other in nested if other != key))
        keys.append(key)
        content = nested[key]
    raise CheckpointError(f"{path} holds itself: {'.'.join(keys[:3])}...; expected a state_dict: save model.state_dict()")


def _like_weights(tensors: Mapping[str, torch.Tensor]) -> int:
    """How much tensors look like the weights of a module.

    3: they are called so, with dots or as usual parameters. 2: there are several arrays. 1: there are any. 0: there are none.
    """
    arrays = [name for name, tensor in tensors.items() if tensor.dim() > 0]
    if any("." in name or name in ("weight", "bias") for name in arrays):
        return 3
    return 2 if len(arrays) > 1 else min(len(tensors), 1)


class _Likeness:
    """The most that tensors in a value, or below it, look like weights. Remembers it: a pickle may hold one object many times."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def __call__(self, value: Any, depth: int = _DEPTH) -> int:
        if id(value) not in self._known:
            own = self._known[id(value)] = _like_weights(_named_tensors(value))  # an object may hold itself
            below = (self(child, depth - 1) for _, child in _children(value)) if depth else ()
            self._known[id(value)] = max(own, *below, 0)
        return self._known[id(value)]


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """What is in `value` by key, the states of optimizers aside."""
    if isinstance(value, Mapping):
        if "param_groups" in value:  # the state of an optimizer
            return
        for key, child in value.items():
            if isinstance(child, Mapping | list | tuple) and "optim" not in str(key).lower():
                yield str(key), child
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            if isinstance(child, Mapping | list | tuple):
                yield str(index), child


def _named_tensors(value: Any) -> dict[str, torch.Tensor]:
    if not isinstance(value, Mapping) or "param_groups" in value:
        return {}
    found = ((name, _as_tensor(item)) for name, item in value.items() if isinstance(name, str))
    return {name: tensor for name, tensor in found if tensor is not None}


def _as_tensor(value: Any) -> torch.Tensor | None:
    """A tensor, or an array of numbers as one; None for all else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "?biufc":
        try:
            return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        except TypeError:  # such as long double
            return None
    return value if isinstance(value, torch.Tensor) else None
