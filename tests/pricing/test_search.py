# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The search for a price, on made-up models of what prices do."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from vllm_vsprefill.pricing.search import GRID, STEPS, Goal, Measured, search

FLOOR = Measured(0.0, 1.0, 0.995, 0.0, 0.001)


def smooth(price: float) -> Measured:
    """Everything changes with the logarithm of the price, from .0001 to 10."""
    step = (math.log10(price) + 4) / 5
    return Measured(price, 1 - 0.95 * step, FLOOR.top1 - 0.1 * step, 0.1 * step, FLOOR.kl + 0.2 * step)


def searched(goal: Goal, measured: dict[float, Measured] | None = None) -> list[Measured]:
    found: list[Measured] = []

    def measure(price: float) -> Measured:
        found.append(smooth(price) if measured is None else measured[price])
        return found[-1]

    search(goal, FLOOR, measure)
    return found


def test_the_grid_has_the_presets_decade_and_takes_five_steps() -> None:
    assert list(GRID) == sorted(set(GRID))
    assert {0.001, 0.01, 0.1} < set(GRID)
    assert (GRID[0], GRID[-1], STEPS) == (0.0001, 10.0, 5)
    assert max(b / a for a, b in itertools.pairwise(GRID)) < 1.52


@pytest.mark.parametrize(
    "goal", [Goal(kind, limit) for kind, limits in (  # type: ignore[arg-type]
        ("top1", (0.7, 2.0, 5.0, 9.9)), ("error", (0.01, 0.05, 0.15)), ("density", (0.1, 0.3, 0.5, 0.9)),
    ) for limit in limits],
)  # fmt: skip
def test_the_best_of_the_grid_is_found(goal: Goal) -> None:
    found = searched(goal)
    assert len(found) <= STEPS
    everything = [smooth(price) for price in GRID]
    best = goal.best(found, FLOOR)
    assert best is not None
    assert best == goal.best(everything, FLOOR)
    # The next price would do too much, or the goal is reached with less.
    at = GRID.index(best.price) + (-1 if goal.kind == "density" else 1)
    assert not goal.is_met(everything[at], FLOOR)


def test_out_of_reach() -> None:
    for goal, nearest in ((Goal("top1", 1e-6), GRID[1]), (Goal("error", 1e-9), GRID[1]), (Goal("density", 0.01), 10.0)):
        found = [one for one in searched(goal) if one.price != GRID[0]]  # the first of the made-up model is perfect
        assert goal.best(found, FLOOR) is None
        assert goal.nearest(found, FLOOR).price == nearest


def test_prices_that_change_nothing_any_more_are_not_tried() -> None:
    flat = {price: smooth(min(price, 0.1)) for price in GRID}
    found = searched(Goal("top1", 50.0), flat)
    assert len(found) == 3
    assert found[-1].density == found[-2].density
    assert len(searched(Goal("density", 0.01), flat)) == 3


def test_prices_that_max_density_makes_nothing_of_do_not_end_a_search() -> None:
    dense = Measured(0.0, 1.0, 1.0, 0.0, 0.0)
    guarded = {price: smooth(price) if price > 2 else dataclasses.replace(dense, price=price) for price in GRID}
    for goal, price in ((Goal("top1", 50.0), GRID[-1]), (Goal("density", 0.5), min(x for x in GRID if x > 2))):
        best = goal.best(searched(goal, guarded), FLOOR)
        assert best is not None
        assert best.price == price


def test_noise_does_not_bring_a_price_that_misses_the_goal() -> None:
    noisy = {price: smooth(price) for price in GRID}
    noisy[GRID[15]] = Measured(GRID[15], 0.5, 0.5, 1.0, 1.0)  # far off, and the first that is tried
    goal = Goal("top1", 5.0)
    best = goal.best(searched(goal, noisy), FLOOR)
    assert best is not None
    assert best.price == GRID[14]
    assert best.below(FLOOR) < 5
