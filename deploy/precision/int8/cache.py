"""Calibrations kept between runs, by the digest of everything that they depend on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deploy.artifact.manifest import Calibration, request_digest
from deploy.host.cache import cache_folder, keep
from deploy.precision.int8.smooth import Channels


@dataclass(frozen=True, kw_only=True)
class CpuRanges:
    """What the CPU form needs beside the calibration of the signed graph.

    scales: of the tensors that have a pair in the CPU form alone. lows: the smallest number of every tensor with a pair.
    """

    scales: dict[str, float]
    lows: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The result of a calibration.

    scales: by activation tensor. joint: see `deploy.precision.int8.rewrite.ToCodes`.
    channels: what is smoothed, by activation tensor of the graph before it is.
    bias: what to add to the bias of a node, float32 (output channels,), by node name.
    noisy: nodes that lose too much in INT8, with the reason. keep: nodes whose tensors FP16 cannot represent, with the reason.
    cpu: what the CPU form needs beside these.
    record: the evidence for the manifest.
    """

    scales: dict[str, float]
    joint: dict[str, float]
    channels: dict[str, Channels]
    bias: dict[str, np.ndarray]
    noisy: dict[str, str]
    keep: dict[str, str]
    cpu: CpuRanges
    record: Calibration


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    scales: dict[str, float]
    joint: dict[str, float]
    channels: dict[str, tuple[list[float], list[float]]]
    bias: dict[str, list[float]]
    noisy: dict[str, str]
    keep: dict[str, str]
    cpu: CpuRanges
    record: Calibration


def folder() -> Path:
    """The folder of the calibrations, which are files of some kilobytes."""
    return cache_folder() / "calibration"


def read(request: dict[str, Any]) -> Calibrated | None:
    """The calibration kept for `request`; None if there is none or its file is damaged: it can be computed again."""
    try:
        kept = msgspec.convert(json.loads(_path(request).read_bytes()), _File)
    except (OSError, ValueError):  # msgspec's errors, JSON's and Unicode's are ValueErrors
        return None
    channels = {name: Channels(shift=_array(shift), scale=_array(scale)) for name, (shift, scale) in kept.channels.items()}
    bias = {name: _array(values) for name, values in kept.bias.items()}
    return Calibrated(
        scales=kept.scales,
        joint=kept.joint,
        channels=channels,
        bias=bias,
        noisy=kept.noisy,
        keep=kept.keep,
        cpu=kept.cpu,
        record=kept.record,
    )


def write(request: dict[str, Any], calibrated: Calibrated) -> None:
    """Keep `calibrated`, completely or not at all; logs a warning if that fails."""
    kept = _File(
        scales=calibrated.scales,
        joint=calibrated.joint,
        channels={name: (each.shift.tolist(), each.scale.tolist()) for name, each in calibrated.channels.items()},
        bias={name: values.tolist() for name, values in calibrated.bias.items()},
        noisy=calibrated.noisy,
        keep=calibrated.keep,
        cpu=calibrated.cpu,
        record=calibrated.record,
    )
    # Not msgspec's own writer, which refuses the paths of skipped images that are not UTF-8.
    keep(_path(request), json.dumps(msgspec.to_builtins(kept)).encode(), "the calibration")


def _array(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def _path(request: dict[str, Any]) -> Path:
    return folder() / f"{request_digest(request)}.json"
