"""The choice of units: as good as trying all, and costs that are found again in times made from them."""

from collections.abc import Sequence
from itertools import product

import msgspec
import numpy as np
import pytest

from deploy.tune.journal import MeasuredUnit
from deploy.tune.solve import Costs, fit_costs, mixes, solve
from deploy.tune.units import Crossing, Unit


def network(rng: np.random.Generator, units: int) -> tuple[Costs, list[Crossing]]:
    """A chain of units with skips: gains of either sign, and damages of three orders of magnitude."""
    pairs = [Crossing(units=(place, place + 1), elements=int(rng.integers(1, 5)) * 100_000) for place in range(units - 1)]
    skips = [sorted(rng.choice(units, 2, replace=False).tolist()) for _ in range(units // 3)]
    pairs += [Crossing(units=(a, b), elements=int(rng.integers(1, 5)) * 100_000) for a, b in skips]
    tensor, thousand = rng.uniform(0, 0.03), rng.uniform(0, 3e-5)
    costs = Costs(
        gains=rng.normal(0.05, 0.05, units),
        crossings=np.array([tensor + thousand * pair.elements / 1e3 for pair in pairs]),
        damage=10 ** rng.uniform(-5, -2, units),
        per_tensor=float(tensor),
        per_thousand=float(thousand),
    )
    return costs, pairs


def brute_force(costs: Costs, pairs: Sequence[Crossing], budget: float) -> float:
    """The least time of all mixes whose damage is within the budget."""
    every = np.array(list(product((False, True), repeat=len(costs.gains))))
    crossed = np.stack([every[:, pair.units[0]] != every[:, pair.units[1]] for pair in pairs], axis=1)
    return float((1 - every @ costs.gains + crossed @ costs.crossings)[every @ costs.damage <= budget].min())


@pytest.mark.parametrize("count", [*range(2, 12), 14])
def test_the_solution_is_as_good_as_that_of_trying_all_mixes(count: int) -> None:
    costs, pairs = network(np.random.default_rng(count), count)
    for share in (0.0, 0.02, 0.3, 1.0):
        budget = share * float(costs.damage.sum()) * (1 + 1e-9)
        chosen = solve(costs, pairs, budget)
        assert costs.damage[chosen].sum() <= budget * (1 + 1e-6)
        assert costs.time(chosen, pairs) == pytest.approx(brute_force(costs, pairs, budget), abs=1e-9)


def test_a_crossing_keeps_a_lone_unit_in_floating_point_and_costs_nothing_between_two_of_one_label() -> None:
    pairs = [Crossing(units=(0, 1), elements=1), Crossing(units=(1, 2), elements=1)]
    costs = Costs(
        gains=np.array([0.2, 0.02, 0.2]), crossings=np.full(2, 0.05), damage=np.ones(3), per_tensor=0.05, per_thousand=0.0
    )
    assert solve(costs, pairs, 3).tolist() == [True, True, True]
    lone = Costs(**{**vars(costs), "gains": np.array([-0.1, 0.08, -0.1])})
    assert solve(lone, pairs, 3).tolist() == [False, False, False]
    assert costs.time(np.array([True, False, True]), pairs) == pytest.approx(1 - 0.4 + 0.1)


def times(costs: Costs, pairs: Sequence[Crossing], error: float = 0.0, seed: int = 0) -> tuple[float, list[MeasuredUnit]]:
    """What a backend that obeys the cost model would measure, with errors of that size in the gains."""
    noise = np.random.default_rng(seed).normal(0, error, len(costs.gains))
    count = len(costs.gains)
    whole = costs.time(np.ones(count, dtype=bool), pairs)
    found = []
    for unit in range(count):
        alone = np.arange(count) == unit
        shares = costs.time(alone, pairs) - noise[unit], costs.time(~alone, pairs) + noise[unit]
        damage = float(costs.damage[unit])
        found.append(MeasuredUnit(alone=shares[0], without=shares[1], whole=whole, error=error, damage=damage))
    return whole, found


def units(count: int) -> list[Unit]:
    return [Unit(name=f"u{index}", nodes=(f"u{index}",), macs=1 / count) for index in range(count)]


def test_costs_are_found_again_in_the_times_that_follow_from_them() -> None:
    costs, pairs = network(np.random.default_rng(3), 9)
    whole, measured = times(costs, pairs)
    found = fit_costs(units(9), pairs, whole=whole, measured=measured)
    np.testing.assert_allclose(found.gains, costs.gains, atol=1e-9)
    np.testing.assert_allclose(found.crossings, costs.crossings, atol=1e-9)
    np.testing.assert_array_equal(found.damage, costs.damage)


def test_noisy_gains_promise_no_more_than_they_keep() -> None:
    """Of units that gain what their work suggests, the mix that a noisy measurement seems to favour is no faster than it says."""
    pairs = [Crossing(units=(place, place + 1), elements=1000) for place in range(29)]
    costs = Costs(gains=np.full(30, 0.02), crossings=np.full(29, 1e-3), damage=np.ones(30), per_tensor=1e-3, per_thousand=0.0)
    whole, noisy = times(costs, pairs, error=0.05)
    promised, kept = [], []
    for trusted in (False, True):
        measured = [msgspec.structs.replace(each, error=0.0 if trusted else 0.05) for each in noisy]
        found = fit_costs(units(30), pairs, whole=whole, measured=measured)
        mix = solve(found, pairs, 30)
        promised.append(found.time(mix, pairs))
        kept.append(costs.time(mix, pairs))
    assert promised[0] == pytest.approx(kept[0], rel=0.15)
    assert promised[1] < 0.7 * kept[1]  # what is guarded against


def test_errors_as_large_as_the_time_leave_the_work_as_the_only_guide() -> None:
    _, pairs = network(np.random.default_rng(6), 8)
    wild = [MeasuredUnit(alone=1 + 2 * (-1) ** unit, without=0.9, whole=0.5, error=2.0, damage=1e-3) for unit in range(8)]
    found = fit_costs(units(8), pairs, whole=0.5, measured=wild)
    assert found.gains == pytest.approx([0.5 / 8] * 8, abs=0.01)
    assert found.crossings.max() < 0.1
    sure = [msgspec.structs.replace(each, error=1e-3) for each in wild]
    assert np.ptp(fit_costs(units(8), pairs, whole=0.5, measured=sure).gains) > 1


def test_a_unit_that_was_not_measured_has_the_rest_of_the_gain_and_the_worst_damage() -> None:
    costs, pairs = network(np.random.default_rng(4), 5)
    whole, measured = times(costs, pairs)
    found = fit_costs(units(5), pairs, whole=whole, measured=[None, *measured[1:]])
    assert found.gains[0] == pytest.approx(costs.gains[0], abs=1e-9)
    assert found.damage[0] == max(each.damage for each in measured[1:])
    nothing = fit_costs(units(5), pairs, whole=whole, measured=[None] * 5)
    assert nothing.gains == pytest.approx([(1 - whole) / 5] * 5)


def test_mixes_go_from_little_damage_to_all_and_none_is_slower_than_floating_point() -> None:
    costs, pairs = network(np.random.default_rng(5), 12)
    found = mixes(costs, pairs)
    damages = [costs.damage[mix].sum() for mix in found]
    assert 2 <= len(found) <= 5
    assert damages == sorted(damages)
    assert all(costs.time(mix, pairs) < 1 for mix in found)
    assert mixes(Costs(**{**vars(costs), "gains": -np.abs(costs.gains)}), pairs) == []
