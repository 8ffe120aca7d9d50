# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The price that reaches a goal: bisection over a grid of prices. Plain Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

GRID = tuple(float(f"{10 ** (step / 6):.2g}") for step in range(-24, 7))
"""Prices that are tried: six a decade, from 0.0001, at which nearly everything is computed, to 10, at which nothing
but window and sinks is. Bisection takes five of the 31."""

Kind = Literal["top1", "error", "density"]


@dataclass(frozen=True)
class Measured:
    """What a price does, over all rows behind the dense beginning.

    Attributes:
        price: 0 for the floor, at which everything is computed.
        density: computed pairs / causal pairs.
        top1: share of rows whose likeliest token is that of dense attention.
        nll: change of the mean negative log-likelihood, in nats.
        kl: mean KL divergence from dense attention's next token, in nats.
    """

    price: float
    density: float
    top1: float
    nll: float
    kl: float

    def below(self, floor: Measured) -> float:
        """Points of top-1 below the floor."""
        return 100 * (floor.top1 - self.top1)

    def figures(self, floor: Measured) -> dict[str, float]:
        """For a report."""
        return {**asdict(self), "below_floor": self.below(floor)}


@dataclass(frozen=True)
class Goal:
    """What a price is to reach.

    Attributes:
        kind: points of top-1 below the floor (``top1``), mean KL divergence above the floor's (``error``), or
            ``density``; at most ``limit``.
    """

    kind: Kind
    limit: float

    def value(self, found: Measured, floor: Measured) -> float:
        """What the goal is about, of a price."""
        if self.kind == "top1":
            return found.below(floor)
        return found.kl - floor.kl if self.kind == "error" else found.density

    def is_met(self, found: Measured, floor: Measured) -> bool:
        """Whether a price reaches the goal."""
        return self.value(found, floor) <= self.limit + 1e-9

    def best(self, found: Iterable[Measured], floor: Measured) -> Measured | None:
        """Of what was measured, what reaches the goal at the least cost: the highest price that is faithful enough, or
        the lowest whose density is low enough. None where nothing does."""
        met = [one for one in found if self.is_met(one, floor)]
        if self.kind == "density":
            return min(met, key=lambda one: one.price, default=None)
        return max(met, key=lambda one: one.price, default=None)

    def nearest(self, found: Sequence[Measured], floor: Measured) -> Measured:
        """Of what was measured, at least one, what is nearest to the goal."""
        return min(found, key=lambda one: self.value(one, floor))

    def describe(self) -> str:
        """For people to read."""
        if self.kind == "top1":
            return f"top-1 at most {self.limit:g} points below the floor"
        if self.kind == "error":
            return f"KL at most {self.limit:g} above the floor's"
        return f"density at most {self.limit:g}"


STEPS = (len(GRID)).bit_length()
"""Prices that a search measures at most."""


def search(goal: Goal, floor: Measured, measure: Callable[[float], Measured]) -> None:
    """Measures prices of the grid, half of what is left at a time; ``measure`` keeps what it finds.

    Figures fall or rise with the price, but for noise; ``Goal.best`` says which of the measured prices it is.
    """
    low, high, least = -1, len(GRID), 2.0  # the answer lies at or between low and high
    while high - low > 1:
        middle = (low + high) // 2
        found = measure(GRID[middle])
        if goal.is_met(found, floor) == (goal.kind == "density"):
            high = middle
        elif found.density == least < 1.0:
            break  # as at a lower price: nothing but what is kept in any case. Where it is 1, max_density may be why.
        else:
            low, least = middle, found.density
