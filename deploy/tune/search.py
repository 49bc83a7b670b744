"""The search: what each unit takes and does is measured, and mixes of several budgets are built, run and timed together."""

import logging
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

import msgspec
import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import CPU_ONNX
from deploy.artifact.tuning import TunedPoint, TunedUnit
from deploy.errors import ArtifactError, BackendError, EngineError, ParityError, PrecisionError
from deploy.evidence.disturbance import Measured
from deploy.evidence.timing import latency
from deploy.progress import Progress
from deploy.tune.journal import Journal, MeasuredMix, MeasuredTimes
from deploy.tune.measure import BASE, Mixes, Stopwatch, is_faster, profiled, time_share
from deploy.tune.solve import Costs, fit_costs, mixes
from deploy.tune.units import Crossing, Unit, units_of

logger = logging.getLogger(__name__)

PROFILES = 3
"""Profiles of each network, of which the medians count."""
LEAST_PROFILED = 0.5
"""The share of the units that must have a time in a profile."""
UNITS_SHARE = 0.6
"""Of the time that the search may take: for measuring units; the rest is for building, timing and testing mixes."""
_REFUSED = (BackendError, EngineError, ParityError, PrecisionError)
"""What says that a mix is too far off, or does not run."""


class Clock:
    """The time that a search may take, in minutes, from now on."""

    def __init__(self, minutes: float) -> None:
        self._limit_s = minutes * 60
        self._start = time.monotonic()

    def over(self, share: float = 1.0) -> bool:
        """Whether this share of it has passed."""
        return time.monotonic() > self._start + share * self._limit_s


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """The units with the damage of each (None where time ran out), and the cost model.

    whole: the time of everything in INT8, as a share of that in floating point.
    """

    units: tuple[Unit, ...]
    pairs: tuple[Crossing, ...]
    times: MeasuredTimes
    damages: Mapping[str, float]
    costs: Costs

    @property
    def complete(self) -> bool:
        return all(unit.name in self.damages for unit in self.units)

    @property
    def whole(self) -> float:
        return self.times.mixes[0].share

    def records(self, chosen: Sequence[str]) -> list[TunedUnit]:
        """For the manifest; `chosen`: the names of the units that are INT8 in the result."""
        floating, int8 = self.times.floating, self.times.int8
        return [
            TunedUnit(
                name=unit.name,
                nodes=list(unit.nodes),
                int8=unit.name in chosen,
                macs=unit.macs,
                floating_time=floating[unit.name] if floating is not None else None,
                int8_time=int8[unit.name] * self.whole if int8 is not None else None,
                gain=float(gain),
                damage=self.damages.get(unit.name),
            )
            for unit, gain in zip(self.units, self.costs.gains, strict=True)
        ]


def weigh(made: Mixes, watch: Stopwatch, journal: Journal, clock: Clock, progress: Progress) -> Weighed:
    """Measure what is not in the journal: the damage of every unit, the largest first, until its share of the time is over, and the times.

    Raises PrecisionError, ParityError, EngineError, BackendError and OutputError.
    """
    units, pairs = units_of(made.graph.model, made.placement(), made.place.shapes(made.base))
    few = _few(units, made) if journal.times is None else {}
    _measure_units(units, made, journal, clock, progress)
    if journal.times is None:  # last: so the machine is in about the same mood when the mixes are timed
        journal.set_times(_times(units, made, few, watch, progress))
    assert journal.times is not None
    costs = fit_costs(units, pairs, journal.times, journal.damages)
    return Weighed(units=units, pairs=pairs, times=journal.times, damages=journal.damages, costs=costs)


def _measure_units(units: Sequence[Unit], made: Mixes, journal: Journal, clock: Clock, progress: Progress) -> None:
    """Put the damages of units into the journal; whatever ends it, those that have been measured are kept."""
    missing = [unit for unit in sorted(units, key=lambda unit: -unit.macs) if unit.name not in journal.damages]
    if clock.over(UNITS_SHARE):
        missing = []
    with ThreadPoolExecutor(made.at_a_time) as pool:
        coming = {
            unit.name: pool.submit(made.damage_alone, f"alone{index}", _others(units, [unit.name]))
            for index, unit in enumerate(missing)
        }
        try:
            for done, (name, damage) in enumerate(coming.items(), len(units) - len(missing)):
                if clock.over(UNITS_SHARE):
                    break
                progress("measuring units", done, len(units))
                journal.add_damage(name, damage.result())
        finally:
            pool.shutdown(cancel_futures=True)
            for name, damage in coming.items():
                if name not in journal.damages and damage.done() and not damage.cancelled() and damage.exception() is None:
                    journal.add_damage(name, damage.result())
    if left := sum(unit.name not in journal.damages for unit in units):
        logger.warning("%d of %d units are not measured: their damages are guessed", left, len(units))


def _few(units: Sequence[Unit], made: Mixes) -> dict[str, tuple[list[str], Artifact]]:
    """Everything in codes, first, and a few mixes with many crossings and with few: the names of their units, and the files."""
    names = [unit.name for unit in units]
    halves = {
        made.place.codes: names,
        "even": names[::2],
        "odd": names[1::2],
        "first": names[: len(names) // 2],
        "last": names[len(names) // 2 :],
    }
    found: dict[str, tuple[list[str], Artifact]] = {}
    for name, chosen in halves.items():
        if not chosen or any(chosen == others for others, _ in found.values()):
            continue
        try:
            found[name] = chosen, made.build(name, _others(units, chosen))
        except _REFUSED as error:
            if not found:
                raise
            logger.warning("the cost model has to do without one mix (%s): %s", name, error)
    return found


def _times(
    units: Sequence[Unit],
    made: Mixes,
    few: Mapping[str, tuple[list[str], Artifact]],
    watch: Stopwatch,
    progress: Progress,
) -> MeasuredTimes:
    """The profiles of the network in floating point and in codes, and the times of the mixes of `_few`, whose files are then deleted."""
    names = [unit.name for unit in units]
    whole = made.place.codes
    mixes = {name: mix for name, (_, mix) in few.items()}
    progress(f"profiling floating point and {whole.upper()}")
    floating: dict[str, float] | None = None
    int8: dict[str, float] | None = None
    try:
        found = profiled([made.base, mixes[whole]], made.place, units, PROFILES)
        if min(np.mean(each > 0) for each in found) < LEAST_PROFILED:
            raise BackendError("the layers that the profiler names are not known in the ONNX file")
        floating, int8 = (dict(zip(names, map(float, each), strict=True)) for each in found)
    except (ArtifactError, BackendError) as error:
        logger.warning("units have the time of their multiply-accumulates: %s", error)
    progress(f"timing floating point and {whole.upper()}")
    measured = watch.measure(mixes)
    for mix in mixes.values():
        shutil.rmtree(mix.path)
    shares = {name: time_share(measured, name) for name in mixes}
    return MeasuredTimes(
        mixes=[MeasuredMix(int8=chosen, share=shares[name].value, error=shares[name].error) for name, (chosen, _) in few.items()],
        floating=floating,
        int8=int8,
    )


def _others(units: Sequence[Unit], chosen: Collection[str]) -> list[str]:
    """The nodes of the units that are not chosen."""
    return [node for unit in units if unit.name not in chosen for node in unit.nodes]


@dataclass(frozen=True, kw_only=True)
class Built:
    """A mix with its record; artifact: None where it was left out."""

    point: TunedPoint
    artifact: Artifact | None = field(repr=False)

    def found(self, **changes: object) -> "Built":
        """With these changes to the record."""
        return replace(self, point=msgspec.structs.replace(self.point, **changes))


def build_points(made: Mixes, weighed: Weighed, progress: Progress) -> list[Built]:
    """The mixes of several budgets and everything in INT8, the safest first.

    The order is that of the damage on the calibration data, of the files as they run; those that cannot be built come last,
    without an artifact. Mixes are named in that order.
    """
    chosen = mixes(weighed.costs, weighed.pairs)
    everything = np.ones(len(weighed.units), dtype=bool)
    chosen = [each for each in chosen if not each.all()] + [everything]
    found: list[Built] = []
    for index, mix in enumerate(chosen):
        progress("building mixes", index, len(chosen))
        found.append(_built(made, weighed, mix, f"point{index}"))
    found.sort(key=lambda each: (each.artifact is None, each.point.damage or 0.0))
    names = iter(f"mix {number}" for number in range(1, len(found) + 1))
    return [each if each.point.name else each.found(name=next(names)) for each in found]


def _built(made: Mixes, weighed: Weighed, mix: np.ndarray, name: str) -> Built:
    point = TunedPoint(
        name=made.place.codes if mix.all() else "",
        int8=[unit.name for unit, chosen in zip(weighed.units, mix, strict=True) if chosen],
        predicted=weighed.whole if mix.all() else weighed.costs.time(mix, weighed.pairs),
    )
    try:
        artifact = made.build(name, _others(weighed.units, point.int8))
        point = msgspec.structs.replace(point, damage=made.damage(artifact), files=_digests(artifact))
        return Built(point=point, artifact=artifact)
    except _REFUSED as error:
        return _without(point, error)


def prove(each: Built, made: Mixes, weighed: Weighed) -> Built:
    """The mix with its evidence, or left out where that is refused."""
    assert each.artifact is not None
    try:
        artifact = made.proved(each.artifact, _others(weighed.units, each.point.int8))
    except _REFUSED as error:
        return _without(each.point, error)
    if (form := artifact.manifest.cpu_form) is not None and form.left_out and each.artifact.cpu_path is not None:
        return Built(
            point=msgspec.structs.replace(each.point, left_out=f"{CPU_ONNX}, by which it was timed: {form.left_out}"),
            artifact=None,
        )
    assert each.point.files.items() <= _digests(artifact).items(), "what was timed and tested is what is delivered"
    return Built(point=each.point, artifact=artifact)


def _digests(artifact: Artifact) -> dict[str, str]:
    return {name: record.sha256 for name, record in artifact.manifest.files.items()}


def _without(point: TunedPoint, error: Exception) -> Built:
    return Built(point=msgspec.structs.replace(point, left_out=str(error).splitlines()[0]), artifact=None)


def time_points(watch: Stopwatch, points: Sequence[Built], progress: Progress) -> tuple[list[Built], float]:
    """The points with their speed beside floating point, in the same rounds; and the median milliseconds of floating point."""
    artifacts = {each.point.name: each.artifact for each in points if each.artifact is not None}
    progress("timing mixes")
    measured = watch.measure(artifacts, lambda found: all(is_faster(found, name) is not None for name in artifacts))
    timed = []
    for each in points:
        name = each.point.name
        if name in artifacts:
            ratio = measured.ratio(BASE, name)
            certain = measured.certain(name) and measured.certain(BASE)
            faster = bool(is_faster(measured, name))
            speed = {"speedup": ratio.value, "low": ratio.low, "high": ratio.high, "certain": certain, "faster": faster}
            each = each.found(**speed, p50_ms=_p50_ms(measured, name))
        timed.append(each)
    return timed, _p50_ms(measured, BASE)


def _p50_ms(measured: Measured[str], name: str) -> float:
    return latency([*chain.from_iterable(measured.samples_s(name))]).p50 * 1e3
