"""Calibrations kept between runs, by the digest of all that they depend on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deploy.artifact.manifest import Calibration, request_digest
from deploy.evidence.parity import Parity
from deploy.host.cache import cache_folder, keep


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
    """Where they are: a file of some kilobytes each."""
    return cache_folder() / "calibration"


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
    kept = _File(
        scales=found.scales,
        bias={name: values.tolist() for name, values in found.bias.items()},
        keep=found.keep,
        record=found.record,
        parity=found.parity,
    )
    keep(_path(request), msgspec.json.encode(kept), "the calibration")


def _path(request: dict[str, Any]) -> Path:
    return folder() / f"{request_digest(request)}.json"
