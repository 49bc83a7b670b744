"""The search: units are measured one at a time, and mixes of several budgets are built, run and timed together."""

import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Stage
from deploy.artifact.tuning import TunedPoint, TunedUnit
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import BackendError, ParityError, PrecisionError
from deploy.evidence.disturbance import Measured
from deploy.evidence.timing import latency
from deploy.pipeline.quantize import QuantizeStage
from deploy.progress import Progress
from deploy.tune.journal import Journal, MeasuredUnit
from deploy.tune.measure import BASE, STAYS, WHOLE, Mixes, Stopwatch, time_share
from deploy.tune.solve import Costs, fit_costs, mixes
from deploy.tune.units import Crossing, Unit, units_of

logger = logging.getLogger(__name__)

UNIT_ROUNDS, UNIT_SLICE_S, UNIT_LONGEST_S = 7, 0.06, 6.0
"""Rounds and seconds of the measurement of a unit, and how long it may take until disturbed rounds are not taken again: the less certain a
time is, the less is made of it (`solve.fit_costs`)."""
POINT_ROUNDS, POINT_SLICE_S = 15, 0.1
UNITS_SHARE = 0.6
"""Of the time that the search may take: for measuring units; the rest is for building, timing and testing mixes."""


class Clock:
    """The time that a search may take, in minutes, from now on."""

    def __init__(self, minutes: float) -> None:
        self._limit_s = minutes * 60
        self._start = time.monotonic()

    def over(self, share: float = 1.0) -> bool:
        """Whether this share of it has passed."""
        return time.monotonic() > self.end(share)

    def end(self, share: float = 1.0) -> float:
        """When this share of it has passed, on the clock of `time.monotonic`."""
        return self._start + share * self._limit_s


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """The units with what was measured of them (None where time ran out), and the cost model that follows.

    whole: the time of everything in INT8, as a share of that in floating point.
    """

    units: tuple[Unit, ...]
    pairs: tuple[Crossing, ...]
    measured: tuple[MeasuredUnit | None, ...]
    whole: float
    costs: Costs

    @property
    def complete(self) -> bool:
        return None not in self.measured

    def records(self, chosen: Sequence[str]) -> list[TunedUnit]:
        """For the manifest; `chosen`: the names of the units that are INT8 in the result."""
        return [
            TunedUnit(
                name=unit.name,
                nodes=list(unit.nodes),
                int8=unit.name in chosen,
                macs=unit.macs,
                alone=found.alone if found else None,
                without=found.without if found else None,
                gain=float(gain),
                damage=found.damage if found else None,
            )
            for unit, found, gain in zip(self.units, self.measured, self.costs.gains, strict=True)
        ]


def weigh(made: Mixes, journal: Journal, clock: Clock, progress: Progress) -> Weighed:
    """Measure every unit that is not in the journal, the largest first, until its share of the time is over.

    Raises PrecisionError, ParityError, BackendError and OutputError.
    """
    shapes = made.place.shapes(made.base)
    units, pairs = units_of(made.graph.model, made.graph.placement(), shapes)
    missing = [unit for unit in sorted(units, key=lambda unit: -unit.macs) if unit.name not in journal.units]
    if missing or journal.whole is None:
        _measure(missing, units, made, journal, clock, progress)
    assert journal.whole is not None
    measured = tuple(journal.units.get(unit.name) for unit in units)
    costs = fit_costs(units, pairs, whole=journal.whole, measured=measured)
    return Weighed(units=units, pairs=pairs, measured=measured, whole=journal.whole, costs=costs)


def _measure(
    missing: Sequence[Unit], units: Sequence[Unit], made: Mixes, journal: Journal, clock: Clock, progress: Progress
) -> None:
    """Put into the journal the time of everything in INT8 and what is missing of the units, until their share of the time is over."""
    everything = made.build(WHOLE, [])
    with Stopwatch(made.place, {BASE: made.base, WHOLE: everything}) as watch:
        if journal.whole is None:
            progress("timing floating point and INT8")
            timed = watch.measure({}, POINT_ROUNDS, UNIT_SLICE_S, time.monotonic() + UNIT_LONGEST_S)
            journal.set_whole(time_share(timed, WHOLE).value)
        for done, unit in enumerate(missing, len(units) - len(missing)):
            if clock.over(UNITS_SHARE):
                logger.warning(
                    "%d of %d units are not measured: their times and damages are guessed", len(units) - done, len(units)
                )
                break
            progress("measuring units", done, len(units))
            if len(units) > 1:
                now = time.monotonic()
                until = now + min(UNIT_LONGEST_S, (clock.end(UNITS_SHARE) - now) / (len(units) - done))
                journal.add_unit(unit.name, _measured(unit, units, made, watch, until))
            else:  # alone it is everything, and nothing is INT8 without it
                whole, damage = journal.whole or 1.0, made.damage(everything)
                journal.add_unit(unit.name, MeasuredUnit(alone=whole, without=1.0, whole=whole, error=0.0, damage=damage))
    shutil.rmtree(everything.path)


def _measured(unit: Unit, units: Sequence[Unit], made: Mixes, watch: Stopwatch, until: float) -> MeasuredUnit:
    """until: on the clock of `time.monotonic`, afterwards the next unit is to have its share of the time."""
    others = [node for other in units if other is not unit for node in other.nodes]
    alone, without = made.build("alone", others), made.build("without", unit.nodes)
    damage = made.damage(alone)
    found = watch.measure({"alone": alone, "without": without}, UNIT_ROUNDS, UNIT_SLICE_S, until)
    for each in (alone, without):
        shutil.rmtree(each.path)
    shares = {name: time_share(found, name) for name in ("alone", "without", WHOLE)}
    error = math.hypot(*(share.error for share in shares.values())) / 2
    values = {"alone": shares["alone"].value, "without": shares["without"].value, "whole": shares[WHOLE].value}
    return MeasuredUnit(**values, error=error, damage=damage)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A mix with its record; artifact: None where it was left out."""

    point: TunedPoint
    artifact: Artifact | None = field(repr=False)

    def found(self, **changes: object) -> "Built":
        """With these changes to the record."""
        return replace(self, point=msgspec.structs.replace(self.point, **changes))


def build_points(made: Mixes, weighed: Weighed, stage: QuantizeStage, folder: Path, progress: Progress) -> list[Built]:
    """The mixes of several budgets and everything in INT8, built as `quantize` builds, with its evidence; the safest first.

    The order is that of the damage on the calibration data, of the files as they run; those that `quantize` would refuse come last,
    without an artifact. Mixes are named in that order.
    """
    chosen = mixes(weighed.costs, weighed.pairs)
    everything = np.ones(len(weighed.units), dtype=bool)
    chosen = [each for each in chosen if not each.all()] + [everything]
    found: list[Built] = []
    for index, mix in enumerate(chosen):
        progress("building mixes", index, len(chosen))
        found.append(_built(made, weighed, mix, stage, folder / f"point{index}"))
    found.sort(key=lambda each: (each.artifact is None, each.point.damage or 0.0))
    names = iter(f"mix {number}" for number in range(1, len(found) + 1))
    return [each if each.point.name == WHOLE else each.found(name=next(names)) for each in found]


def _built(made: Mixes, weighed: Weighed, mix: np.ndarray, stage: QuantizeStage, out: Path) -> Built:
    stay = {node: STAYS for unit, chosen in zip(weighed.units, mix, strict=True) if not chosen for node in unit.nodes}
    point = TunedPoint(
        name=WHOLE if mix.all() else "",
        int8=[unit.name for unit, chosen in zip(weighed.units, mix, strict=True) if chosen],
        predicted=weighed.whole if mix.all() else weighed.costs.time(mix, weighed.pairs),
    )
    try:
        with ArtifactWriter(out) as writer:
            for function in made.base.manifest.functions:
                function.copy(made.base.path, writer.path)
            make = partial(made.graph.quantized, stay=stay, cpu=True)
            artifact = writer.commit(stage.write(writer, Stage(name="tune", request=""), make))
        files = {name: record.sha256 for name, record in artifact.manifest.files.items()}
        point = msgspec.structs.replace(point, damage=made.damage(artifact), files=files)
    except (BackendError, ParityError, PrecisionError) as error:
        return Built(point=msgspec.structs.replace(point, left_out=str(error).splitlines()[0]), artifact=None)
    return Built(point=point, artifact=artifact)


def time_points(made: Mixes, points: Sequence[Built], progress: Progress) -> tuple[list[Built], float]:
    """The points with their speed beside floating point, in the same rounds; and the median milliseconds of floating point."""
    artifacts = {each.point.name: each.artifact for each in points if each.artifact is not None}
    progress("timing mixes")
    with Stopwatch(made.place, {BASE: made.base}) as watch:
        measured = watch.measure(artifacts, POINT_ROUNDS, POINT_SLICE_S)
    timed = []
    for each in points:
        name = each.point.name
        if name in artifacts:
            ratio = measured.ratio(BASE, name)
            certain = measured.certain(name) and measured.certain(BASE)
            each = each.found(
                speedup=ratio.value, low=ratio.low, high=ratio.high, p50_ms=_p50_ms(measured, name), certain=certain
            )
        timed.append(each)
    return timed, _p50_ms(measured, BASE)


def _p50_ms(measured: Measured[str], name: str) -> float:
    return latency([*chain.from_iterable(measured.samples_s(name))]).p50 * 1e3
