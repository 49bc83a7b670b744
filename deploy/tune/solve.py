"""The choice of units to quantize: least time, with the damage inside a budget and with what crossings cost, solved exactly.

A unit u in INT8 takes `gains[u]` away from the time and does `damage[u]`; a crossing whose two units have different labels adds its
cost. With x in {0, 1} for the units and y for the crossings,

    minimize  sum costs[e] y[e] - sum gains[u] x[u]   where   y[e] >= |x[u] - x[v]|   and   sum damage[u] x[u] <= budget

is a mixed-integer linear programme: HiGHS (Huangfu and Hall 2018, Parallelizing the dual revised simplex method, Math. Program. Comput.
10) solves it by branch and bound.
"""

import ctypes
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, lsq_linear, milp
from scipy.sparse import coo_array

from deploy.errors import PrecisionError
from deploy.tune.journal import MeasuredTimes
from deploy.tune.units import Crossing, Unit

BUDGETS = (0.3, 0.6, 0.8, 0.85, 0.9, 0.95, 1.0)
"""The shares of the units whose damages make the budgets: a few units do most of it, and so the steps are smaller at the end."""
STEP = 0.05
"""The share of the time by which a mix must be faster than a safer one: of less, no measurement of some seconds shows which is faster."""
_PARTS = 1e3
_CROSSING = 0.05
"""The share of the time that a crossing may cost, before anything is measured."""
_PROFILE, _LEAST = 0.25, 2e-3
"""How far a gain by profiles may be off, as a share of the unit's two times; and at least, as a share of the time of the network."""
_TINY = 1e-12
_SILENCE = threading.Lock()
_MEASURED = 0.01
"""What a measured time may be off besides its standard error, as a share of the time in floating point."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The cost model, in shares of the time in floating point.

    gains: (units,) what INT8 takes away from each. crossings: (crossings,) what each costs, 0 or more. damage: (units,).
    per_tensor, per_thousand: the parts of a crossing's cost.
    """

    gains: np.ndarray
    crossings: np.ndarray
    damage: np.ndarray
    per_tensor: float
    per_thousand: float

    def time(self, chosen: np.ndarray, pairs: Sequence[Crossing]) -> float:
        """The time of a mix, (units,) bool, as a share of that in floating point."""
        return float(1 - self.gains[chosen].sum() + self.crossings[_crossed(chosen, pairs)].sum())


def fit_costs(units: Sequence[Unit], pairs: Sequence[Crossing], times: MeasuredTimes, damages: Mapping[str, float]) -> Costs:
    """The cost model by profiles and by the times of a few mixes. damages: by the name of a unit, where it was measured; others have that of the worst.

    A unit gains what it takes less in INT8 by the profiles; what these do not account for is spread over all units. A crossing costs an amount for the
    tensor and one for each number in it, 0 or more. Both are moved to the times of the mixes by least squares, each as far as its own error allows
    (the estimate of greatest posterior density for normal errors: Gelman et al., Bayesian Data Analysis, 3rd edition 2013, section 14.8).
    """
    count, whole = len(units), times.mixes[0].share
    names = [unit.name for unit in units]
    macs = np.array([unit.macs for unit in units]) + 1e-6
    floating = _shares(times.floating, names, macs)
    int8 = whole * _shares(times.int8, names, macs)
    prior = floating - int8
    prior += (1 - whole - prior.sum()) * (floating + int8) / max((floating + int8).sum(), _TINY)
    sizes = np.array([[1, pair.elements / _PARTS] for pair in pairs]).reshape(-1, 2)
    errors = np.concatenate(
        [_PROFILE * (floating + int8) + _LEAST, _CROSSING / np.maximum(sizes.mean(axis=0) if pairs else 1.0, _TINY) * np.ones(2)]
    )
    rows, wanted = [np.eye(count + 2)], [np.zeros(count + 2)]
    for mix in times.mixes:
        chosen = np.isin(names, mix.int8)
        row = np.concatenate([np.where(chosen, -1.0, 0.0), sizes[_crossed(chosen, pairs)].sum(axis=0)])
        error = math.hypot(mix.error, _MEASURED)
        rows.append(row[None] * errors / error)
        wanted.append(np.array([(mix.share - 1 + prior[chosen].sum()) / error]))
    least = np.concatenate([np.full(count, -np.inf), np.zeros(2)])
    found = lsq_linear(np.vstack(rows), np.concatenate(wanted), bounds=(least, np.inf)).x * errors
    per_tensor, per_thousand = (float(part) for part in found[count:])
    worst = max(damages.values(), default=1.0)
    return Costs(
        gains=prior + found[:count],
        crossings=sizes @ found[count:],
        damage=np.array([damages.get(name, worst) for name in names]),
        per_tensor=per_tensor,
        per_thousand=per_thousand,
    )


def _shares(profile: Mapping[str, float] | None, names: Sequence[str], macs: np.ndarray) -> np.ndarray:
    """(units,) by the profile, or by the multiply-accumulates where there is none."""
    return macs / macs.sum() if profile is None else np.array([profile[name] for name in names])


def _crossed(chosen: np.ndarray, pairs: Sequence[Crossing]) -> np.ndarray:
    """(crossings,) bool: those whose units have different labels."""
    return np.array([chosen[pair.units[0]] != chosen[pair.units[1]] for pair in pairs], dtype=bool)


def solve(costs: Costs, pairs: Sequence[Crossing], budget: float) -> np.ndarray:
    """The units of the fastest mix whose damage adds up to at most `budget`, (units,) bool. Raises PrecisionError if HiGHS fails."""
    units, count = len(costs.gains), len(pairs)
    scale = max(float(costs.damage.sum()), math.ulp(0.0))
    rows, columns, values = [], [], []
    for place, pair in enumerate(pairs):
        for sign, row in ((1, 2 * place), (-1, 2 * place + 1)):
            rows += [row] * 3
            columns += [units + place, *pair.units]
            values += [1, -sign, sign]
    rows += [2 * count] * units
    columns += range(units)
    values += list(-costs.damage / scale)
    matrix = coo_array((values, (rows, columns)), shape=(2 * count + 1, units + count))
    least = np.zeros(2 * count + 1)
    least[-1] = -budget / scale
    with _silent():
        found = milp(
            np.concatenate([-costs.gains, costs.crossings]),
            integrality=np.repeat([1, 0], [units, count]),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix.tocsr(), lb=least),
            options={"mip_rel_gap": 0},
        )
    if found.x is None:
        raise PrecisionError(f"HiGHS found no mix: {found.message}")
    return np.asarray(found.x[:units] > 0.5)


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps what C code prints away from standard output, which is for results: HiGHS prints what it tries, whatever `disp` is (seen with scipy 1.17)."""
    library = ctypes.CDLL(None)
    with _SILENCE:
        if sys.stdout is not None:
            sys.stdout.flush()
        library.fflush(None)
        try:
            kept = os.dup(1)
        except OSError:  # it is closed
            yield
            return
        try:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), 1)
            yield
        finally:
            library.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


def mixes(costs: Costs, pairs: Sequence[Crossing]) -> list[np.ndarray]:
    """The fastest mixes of the `BUDGETS`, without repetitions, without the one that quantizes nothing, and without those that the
    cost model has slower than floating point. Between the safest and the fastest are those that are faster by `STEP` than a safer one.

    The budgets are the damage of the least harmful units, so many of all: the damage of single units is of different orders of magnitude, so
    that equal steps between nothing and all would be alike.
    """
    sums = np.cumsum(np.sort(costs.damage))
    found: list[np.ndarray] = []
    for part in BUDGETS:
        budget = float(sums[math.ceil(len(sums) * part - 1e-9) - 1])
        chosen = solve(costs, pairs, budget * (1 + 1e-9))
        if chosen.any() and costs.time(chosen, pairs) < 1 and not any(np.array_equal(chosen, other) for other in found):
            found.append(chosen)
    kept = found[:1]
    for each in found[1:-1]:
        if costs.time(each, pairs) <= (1 - STEP) * costs.time(kept[-1], pairs):
            kept.append(each)
    return kept + found[1:][-1:]
