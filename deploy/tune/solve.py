"""The choice of units to quantize: least time, with the damage inside a budget and with what crossings cost, solved exactly.

A unit u in INT8 takes `gains[u]` away from the time and does `damage[u]`; a crossing whose two units have different labels adds its
cost. With x in {0, 1} for the units and y for the crossings,

    minimize  sum costs[e] y[e] - sum gains[u] x[u]   where   y[e] >= |x[u] - x[v]|   and   sum damage[u] x[u] <= budget

is a mixed-integer linear programme: HiGHS (Huangfu and Hall 2018, Parallelizing the dual revised simplex method, Math. Program. Comput.
10) solves it by branch and bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp, nnls
from scipy.sparse import coo_array

from deploy.errors import PrecisionError
from deploy.tune.journal import MeasuredUnit
from deploy.tune.units import Crossing, Unit

BUDGETS = 5
_PARTS = 1e3
_CROSSING = 0.05
"""The share of the time that a crossing may cost, before anything is measured."""
_EXACT = 1e-7
"""An error below it is taken for that."""


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
        crossed = np.array([chosen[pair.units[0]] != chosen[pair.units[1]] for pair in pairs], dtype=bool)
        return float(1 - self.gains[chosen].sum() + self.crossings[crossed].sum())


def fit_costs(
    units: Sequence[Unit],
    pairs: Sequence[Crossing],
    *,
    whole: float,
    measured: Sequence[MeasuredUnit | None],
) -> Costs:
    """The cost model from the times, as shares of that in floating point, of everything in INT8 (`whole`), and of each unit alone and
    of all but it; None where they were not measured.

    Both times of a unit contain the crossings around it, the second with the gain the other way round: half of their sum, less what
    there is without it, is what its crossings cost, and half of the difference is its gain. A crossing costs an amount for the tensor
    and one for each number in it, fitted to all units. Gains are drawn towards what their multiply-accumulates
    suggest, as far as the errors of the measurements ask for (`_shrunk`), and moved together, so that they add up to `whole`. What was
    not measured has its share of the rest, and the damage of the worst.
    """
    weights = np.array([unit.macs for unit in units]) + 1e-3
    known = np.array([each is not None for each in measured])
    own = np.array([0.0 if each is None else each.alone - 1 for each in measured])
    rest = np.array([0.0 if each is None else each.without - each.whole for each in measured])
    incident = np.zeros((len(units), 2))
    for pair in pairs:
        for place in pair.units:
            incident[place] += (1, pair.elements / _PARTS)
    errors = np.array([each.error for each in measured if each is not None])
    parts = _crossing_parts(incident[known], ((own + rest) / 2)[known], errors) if known.any() and pairs else np.zeros(2)
    prior = (1 - whole) * weights / weights.sum()
    gains = prior.copy()
    gains[known] = _shrunk(((rest - own) / 2)[known], prior[known], errors)
    missing = (1 - whole) - gains.sum()
    spread = weights * ~known if not known.all() else weights
    gains = gains + missing * spread / spread.sum()
    worst = max((each.damage for each in measured if each is not None), default=1.0)
    return Costs(
        gains=gains,
        crossings=np.array([parts[0] + parts[1] * pair.elements / _PARTS for pair in pairs]),
        damage=np.array([worst if each is None else each.damage for each in measured]),
        per_tensor=float(parts[0]),
        per_thousand=float(parts[1]),
    )


def _crossing_parts(incident: np.ndarray, costs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The two parts of a crossing's cost, (2,): by least squares, none below 0, weighted by the errors, and drawn towards 0 where these are
    larger than what a crossing may cost (`_CROSSING`)."""
    usual = _CROSSING / np.maximum(incident.sum(axis=0) / max(incident[:, 0].sum(), 1.0), 1e-12)
    rows = np.vstack([incident / np.maximum(errors, _EXACT)[:, None], np.diag(1 / usual)])
    parts, _ = nnls(rows * usual, np.concatenate([costs / np.maximum(errors, _EXACT), np.zeros(2)]))
    return np.asarray(parts * usual)


def _shrunk(found: np.ndarray, prior: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Empirical Bayes (Efron and Morris 1973, Stein's estimation rule and its competitors, J. Am. Stat. Assoc. 68(341)), all (units,).

    Without it, the solver would choose the units whose errors happened to be in their favour, and promise too much.
    """
    if not len(found):
        return found
    spread = max(float(np.mean(np.square(found - prior) - np.square(errors))), 0.0)
    total = spread + np.square(errors)
    kept = np.divide(spread, total, out=np.ones_like(total), where=total > 0)
    return np.asarray(prior + kept * (found - prior))


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


def mixes(costs: Costs, pairs: Sequence[Crossing]) -> list[np.ndarray]:
    """The fastest mixes of `BUDGETS` budgets, without repetitions, without the one that quantizes nothing, and without those that the
    cost model has slower than floating point.

    The budgets are the damage of the least harmful fifth of the units, of two fifths, and so on to all: the damage of single units
    is of different orders of magnitude, so that equal steps between nothing and all would be alike.
    """
    sums = np.cumsum(np.sort(costs.damage))
    found: list[np.ndarray] = []
    for part in range(1, BUDGETS + 1):
        budget = float(sums[math.ceil(len(sums) * part / BUDGETS) - 1])
        chosen = solve(costs, pairs, budget * (1 + 1e-9))
        if chosen.any() and costs.time(chosen, pairs) < 1 and not any(np.array_equal(chosen, other) for other in found):
            found.append(chosen)
    return found
