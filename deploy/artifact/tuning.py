"""The record of `deploy tune`: the units that were weighed, the mixes that were built, and what was found of each."""

from typing import Literal

import msgspec

Verdict = Literal["inside", "undecided", "outside"]
"""Of a loss against its limit: its 95 % interval is inside, only its estimate is, or not even that."""


Stopped = Literal["interrupted", "minutes"]
"""Why a search ended early."""


class TunedUnit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Layers that are INT8 or floating point together.

    name: the module of its first layer. nodes: the quantized nodes. int8: whether they are INT8 in the result. macs: its share of the
    multiply-accumulates, 0 to 1. floating_time, int8_time: of its layers by profiles of the two networks, as shares of the time in floating
    point; None where the backend has none. gain: the share of the time that INT8 takes away from the unit itself, without
    crossings, by the cost model. damage: what INT8 of this unit alone does to the outputs (`tune.damage`); None where time ran out.
    """

    name: str
    nodes: list[str]
    int8: bool
    macs: float
    floating_time: float | None
    int8_time: float | None
    gain: float
    damage: float | None


class TunedPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mix that was built and run.

    int8: the names of its units in INT8. predicted: its time as a share of that in floating point, by the cost model.
    speedup, low, high: over floating point, measured in pairs, with the 95 % interval. p50_ms: the median latency. certain: whether
    other programs left the times as they are. faster: whether the rounds, in which both were disturbed alike, show that it is faster.
    damage: on the calibration data. verdict: None where it was not tested. value: its score; loss, loss_low, loss_high: in the unit of the metric, None for sqnr and cosine. images: how many more would decide, -1: no number.
    files: the SHA-256 of every file that was tested. left_out: why it was not run.
    """

    name: str
    int8: list[str]
    predicted: float
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    p50_ms: float | None = None
    certain: bool = True
    faster: bool = False
    damage: float | None = None
    verdict: Verdict | None = None
    value: float | None = None
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    images: int | None = None
    files: dict[str, str] = {}
    left_out: str | None = None


class Tuning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an artifact was chosen.

    result: the name of the point that the artifact is, `fp32` or `fp16` for floating point; because: why. floats, codes: what is mixed; where codes
    is `fp8`, that is meant wherever INT8 is named. backend, cpu, gpu, threads, batch: where and how time was measured. metric, limit, unit: what the loss was held to, or for sqnr and cosine the least to be reached. rows: of the calibration
    data that damage was measured on. kind: what the damage is. p50_ms: of floating point. crossing: the share of the time that a
    tensor between INT8 and floating point costs, and that of a thousand numbers in it. points: the safest first, as they were tested.
    stopped: why not all was measured and tested that could have been.
    """

    result: str
    because: str
    floats: Literal["fp32", "fp16"] = "fp32"
    codes: Literal["int8", "fp8"] = "int8"
    backend: str
    cpu: str
    gpu: str | None = None
    threads: int
    batch: int
    metric: str
    limit: float
    unit: str
    rows: int
    kind: Literal["kl", "relative"]
    p50_ms: float
    crossing: tuple[float, float]
    units: list[TunedUnit]
    points: list[TunedPoint]
    stopped: Stopped | None = None
