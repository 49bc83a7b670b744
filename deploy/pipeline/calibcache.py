"""Calibrations kept between runs, by the digest of all that they depend on."""

import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deploy.artifact import Calibration, request_digest
from deploy.parity import Parity

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What calibration finds: a scale by activation tensor, what to add to the bias by node, and the evidence.

    keep: nodes that FP16 cannot hold, with the reason. parity: None until the graph has been compared.
    """

    scales: dict[str, float]
    bias: dict[str, np.ndarray]
    keep: dict[str, str]
    record: Calibration
    parity: Parity | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    scales: dict[str, float]
    bias: dict[str, list[float]]
    keep: dict[str, str]
    record: Calibration
    parity: Parity | None


def folder() -> Path:
    """`deploy/calibration` in $XDG_CACHE_HOME, or in ~/.cache: a file of some kilobytes a calibration."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deploy" / "calibration"


def read(request: dict[str, Any]) -> Calibrated | None:
    """What was kept for `request`; None where there is nothing, or the file is damaged: it can be found again."""
    try:
        kept = msgspec.json.decode(_path(request).read_bytes(), type=_File)
    except (OSError, msgspec.DecodeError):
        return None
    bias = {name: np.array(values, dtype=np.float32) for name, values in kept.bias.items()}
    return Calibrated(scales=kept.scales, bias=bias, keep=kept.keep, record=kept.record, parity=kept.parity)


def write(request: dict[str, Any], found: Calibrated) -> None:
    """Keep `found`, whole or not at all. Where that cannot be done a warning says so."""
    path = _path(request)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    kept = _File(
        scales=found.scales,
        bias={name: values.tolist() for name, values in found.bias.items()},
        keep=found.keep,
        record=found.record,
        parity=found.parity,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.json.encode(kept))
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        logger.warning("the calibration cannot be kept in %s: %s", path, error)


def _path(request: dict[str, Any]) -> Path:
    return folder() / f"{request_digest(request)}.json"
