"""The choice of units: as good as trying all, and costs that are found again in times made from them."""

import sys
from collections.abc import Sequence
from itertools import pairwise, product

import msgspec
import numpy as np
import pytest

from deploy.tune.journal import MeasuredMix, MeasuredTimes
from deploy.tune.solve import STEP, Costs, fit_costs, mixes, solve
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


@pytest.mark.parametrize(("seed", "share"), [(12, 0.6), (138, 0.3)])
def test_nothing_is_printed(seed: int, share: float, capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS would, of these: "transformNewIntegerFeasibleSolution tmpSolver.run();"."""
    costs, pairs = network(np.random.default_rng(seed), 40)
    sys.stdout.write("before\n")
    solve(costs, pairs, share * float(costs.damage.sum()))
    sys.stdout.write("behind\n")
    assert capfd.readouterr() == ("before\nbehind\n", "")


def test_a_crossing_keeps_a_lone_unit_in_floating_point_and_costs_nothing_between_two_of_one_label() -> None:
    pairs = [Crossing(units=(0, 1), elements=1), Crossing(units=(1, 2), elements=1)]
    costs = Costs(
        gains=np.array([0.2, 0.02, 0.2]), crossings=np.full(2, 0.05), damage=np.ones(3), per_tensor=0.05, per_thousand=0.0
    )
    assert solve(costs, pairs, 3).tolist() == [True, True, True]
    lone = Costs(**{**vars(costs), "gains": np.array([-0.1, 0.08, -0.1])})
    assert solve(lone, pairs, 3).tolist() == [False, False, False]
    assert costs.time(np.array([True, False, True]), pairs) == pytest.approx(1 - 0.4 + 0.1)


def units(count: int) -> list[Unit]:
    return [Unit(name=f"u{index}", nodes=(f"u{index}",), macs=1 / count) for index in range(count)]


def halves(count: int) -> list[np.ndarray]:
    """Everything, the even and the odd ones, the first and the last."""
    place = np.arange(count)
    return [place >= 0, place % 2 == 0, place % 2 == 1, place < count // 2, place >= count // 2]


def times(
    costs: Costs, pairs: Sequence[Crossing], *, off: np.ndarray | float = 0.0, error: float = 1e-6, wrong: float = 0.0
) -> MeasuredTimes:
    """What a backend that obeys the cost model would measure. off: what the profiles have too much of each gain. wrong: what mixes take too long."""
    count = len(costs.gains)
    whole = costs.time(np.ones(count, dtype=bool), pairs)
    floating = np.full(count, 0.1)
    int8 = (floating - costs.gains - off) / whole
    names = [unit.name for unit in units(count)]
    found = [
        MeasuredMix(
            int8=[name for name, taken in zip(names, chosen, strict=True) if taken],
            share=costs.time(chosen, pairs) + (0 if chosen.all() else wrong),
            error=error,
        )
        for chosen in halves(count)
    ]
    shares = [dict(zip(names, map(float, each), strict=True)) for each in (floating, int8)]
    return MeasuredTimes(mixes=found, floating=shares[0], int8=shares[1])


def known(costs: Costs) -> dict[str, float]:
    return {f"u{index}": float(each) for index, each in enumerate(costs.damage)}


@pytest.mark.parametrize("seed", range(4))
def test_costs_are_found_again_in_the_times_that_follow_from_them(seed: int) -> None:
    costs, pairs = network(np.random.default_rng(seed), 12)
    found = fit_costs(units(12), pairs, times(costs, pairs), known(costs))
    np.testing.assert_allclose(found.gains, costs.gains, atol=0.01)
    np.testing.assert_allclose(found.crossings, costs.crossings, atol=0.005)
    np.testing.assert_array_equal(found.damage, costs.damage)
    for mix in np.random.default_rng(seed).random((20, 12)) < 0.5:
        assert found.time(mix, pairs) == pytest.approx(costs.time(mix, pairs), abs=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_times_of_mixes_mend_profiles_that_are_off(seed: int) -> None:
    """Profiles that have the gains of early units too large, and those of late ones too small, as where the clock of the processor changes."""
    costs, pairs = network(np.random.default_rng(seed), 12)
    off = np.linspace(0.04, -0.04, 12)
    mended = fit_costs(units(12), pairs, times(costs, pairs, off=off), known(costs))
    left = fit_costs(units(12), pairs, times(costs, pairs, off=off, error=10.0), known(costs))
    errors = [
        np.mean([abs(found.time(mix, pairs) - costs.time(mix, pairs)) for mix in np.random.default_rng(9).random((50, 12)) < 0.5])
        for found in (mended, left)
    ]
    assert errors[0] < 0.6 * errors[1]


def test_times_that_are_uncertain_leave_the_profiles_as_they_are() -> None:
    costs, pairs = network(np.random.default_rng(6), 8)
    found = fit_costs(units(8), pairs, times(costs, pairs, wrong=0.5, error=10.0), known(costs))
    np.testing.assert_allclose(found.gains, costs.gains, atol=0.01)
    sure = fit_costs(units(8), pairs, times(costs, pairs, wrong=0.5), known(costs))
    assert sure.time(halves(8)[1], pairs) > costs.time(halves(8)[1], pairs) + 0.3


def test_without_a_profile_units_have_their_share_of_the_work_and_without_a_damage_that_of_the_worst() -> None:
    costs, pairs = network(np.random.default_rng(4), 5)
    blind = msgspec.structs.replace(times(costs, pairs, error=10.0), floating=None, int8=None)
    found = fit_costs(units(5), pairs, blind, {"u1": 0.25, "u2": 0.5})
    assert found.gains == pytest.approx([(1 - blind.mixes[0].share) / 5] * 5, abs=1e-3)
    assert found.damage.tolist() == [0.5, 0.25, 0.5, 0.5, 0.5]
    assert fit_costs(units(5), pairs, blind, {}).damage.tolist() == [1.0] * 5


def test_one_unit_without_crossings_gains_all_that_there_is() -> None:
    only = MeasuredTimes(mixes=[MeasuredMix(int8=["u0"], share=0.6, error=0.01)], floating={"u0": 0.9}, int8={"u0": 0.8})
    found = fit_costs(units(1), [], only, {"u0": 0.1})
    assert found.gains == pytest.approx([0.4])
    assert found.crossings.shape == (0,)


def test_mixes_go_from_little_damage_to_all_and_none_is_slower_than_floating_point() -> None:
    costs, pairs = network(np.random.default_rng(5), 12)
    found = mixes(costs, pairs)
    damages = [costs.damage[mix].sum() for mix in found]
    assert 2 <= len(found) <= 7
    assert damages == sorted(damages)
    assert all(costs.time(mix, pairs) < 1 for mix in found)
    assert mixes(Costs(**{**vars(costs), "gains": -np.abs(costs.gains)}), pairs) == []


@pytest.mark.parametrize("seed", range(4))
def test_between_the_safest_and_the_fastest_mix_are_steps_that_can_be_measured(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs, pairs = network(np.random.default_rng(seed), 30)
    costs = Costs(**{**vars(costs), "gains": costs.gains / 4})  # about 0.3 in all
    found = mixes(costs, pairs)
    times = [costs.time(mix, pairs) for mix in found]
    assert all(later <= (1 - STEP) * earlier for earlier, later in pairwise(times[:-1]))
    monkeypatch.setattr("deploy.tune.solve.STEP", 0.0)
    everything = mixes(costs, pairs)
    assert len(found) < len(everything)
    assert np.array_equal(found[0], everything[0])
    assert np.array_equal(found[-1], everything[-1])
    assert times[-1] == min(costs.time(mix, pairs) for mix in everything)
