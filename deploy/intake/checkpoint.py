"""Reading trained weights from a file, safely: nothing in a checkpoint is ever executed."""

import argparse
import errno
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from deploy.errors import CheckpointError
from deploy.intake.fit import StateDict

CONTAINERS = (
    "state_dict", "model_state_dict", "model", "net_state_dict", "net", "network", "module", "weights", "params",
    "state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema",
)  # fmt: skip
"""Keys that may hold the weights, in the order they are tried: trained weights before their moving average."""

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
    """The weights in a `.safetensors` file, or in what torch.save wrote (`.pt`, `.pth`, `.tar`, ...), on the CPU.

    Reads with `weights_only=True`. The weights may be the whole file, or be under one of the keys in `CONTAINERS`, nested up
    to three levels deep: `found_under` of the result is the key, and `others` are the keys of other weights beside it.

    Raises CheckpointError for a file that is missing, truncated, no checkpoint, a TorchScript archive, a pickle that
    would run code, or one that holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is a directory, not a checkpoint" if path.is_dir() else f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            return StateDict(safetensors.torch.load_file(path), path=path, ordered=False)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    content = _load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state_dict: save model.state_dict()")
    key, weights, others = _find(content, path)
    metadata = getattr(weights, "_metadata", None)
    tensors = {name: value for name, value in weights.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if "n_averaged" in tensors and all(name.startswith("module.") for name in tensors if name != "n_averaged"):
        del tensors["n_averaged"]  # the counter of torch.optim.swa_utils.AveragedModel
    return StateDict(tensors, path=path, found_under=key, others=others, metadata=metadata)


def _load_pickle(path: Path) -> Any:
    _refuse_other_archives(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
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


def _refuse_other_archives(path: Path) -> None:
    """Raise CheckpointError, with advice, for archives that are not checkpoints: of torch and of other programs."""
    try:
        with path.open("rb") as file:
            if file.read(262)[257:] == b"ustar":  # many checkpoints are named `.tar`, but this is a real archive
                raise CheckpointError(f"{path} is a tar archive: unpack it and give the checkpoint inside")
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript archive, which carries code: save the state_dict instead,"
            " torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if "models/model.json" in names:
        raise CheckpointError(f"{path} is a torch.export archive, not a checkpoint: save the state_dict of the module instead")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive that torch.save did not write: unpack it and give the checkpoint inside")


def _find(content: Mapping[Any, Any], path: Path, depth: int = 3) -> tuple[str, Mapping[Any, Any], tuple[str, ...]]:
    """The key of the weights ("" for the whole file), the weights, and the keys of other weights beside them."""
    nested = {key: value for key, value in content.items() if isinstance(value, Mapping) and _has_weights(value, depth - 1)}
    known = [key for key in CONTAINERS if key in nested]
    if not known and _has_tensors(content):
        return "", content, ()
    if not known and len(nested) > 1:
        raise CheckpointError(
            f"{path} holds several sets of weights: {', '.join(map(repr, nested))}; save the one you want to a separate file"
        )
    if not nested:
        keys = ", ".join(repr(key) for key in list(content)[:10]) or "nothing"
        raise CheckpointError(f"{path} holds no weights: expected tensors by name, found {keys}")
    key = known[0] if known else next(iter(nested))
    inner, weights, _ = _find(nested[key], path, depth - 1)
    others = tuple(str(other) for other in nested if other != key)
    return f"{key}.{inner}" if inner else str(key), weights, others


def _has_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) and isinstance(item, torch.Tensor) for key, item in value.items())


def _has_weights(value: Mapping[Any, Any], depth: int) -> bool:
    """Whether `value` has named tensors, directly or under one of the known keys, up to `depth` levels deep."""
    if _has_tensors(value):
        return True
    inner = [value[key] for key in CONTAINERS if isinstance(value.get(key), Mapping)]
    return depth > 0 and any(_has_weights(item, depth - 1) for item in inner)
