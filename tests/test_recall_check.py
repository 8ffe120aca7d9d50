# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""When the recall of an indexer is looked at, and what is said of it."""

from __future__ import annotations

import math

import pytest

from vllm_vsprefill.recall_check import STEPS, TRIES, Recall, RecallCheck


class Followed:
    """A check of layers 3 and 5, and what it tells."""

    def __init__(self, expected: dict[int, float | None]) -> None:
        self.told: list[Recall] = []
        self.check = RecallCheck(expected.__getitem__, self.told.append)
        self.totals = {3: (0.0, 0.0), 5: (0.0, 0.0)}

    def step(self, first: float | None, second: float | None) -> None:
        """A step whose two KV heads had this recall in each layer; None: the guard sent the layer's rows away."""
        assert self.check.is_due
        self.check.mark()
        for layer, found in ((3, first), (5, second)):
            if found is not None:
                total, number = self.totals[layer]
                self.totals[layer] = total + 2 * found, number + 2
        assert self.check.take()
        self.check.read(dict(self.totals))


def test_the_first_steps_are_looked_at_and_no_others() -> None:
    run = Followed({3: 0.9, 5: 0.95})
    for _ in range(STEPS - 1):
        run.step(0.8, 0.6)
        assert not run.check.take()  # of a step in which no layer has looked, nothing is read
    assert run.told == []
    run.step(0.8, 0.6)
    assert not run.check.is_due
    (found,) = run.told
    assert found.found == pytest.approx(0.7)
    assert found.expected == pytest.approx(0.925)
    assert (found.steps, found.is_low) == (STEPS, True)
    # On a GPU a step or two more are on their way.
    run.check.read(dict(run.totals))
    assert len(run.told) == 1


def test_layers_count_alike_however_often_they_ran_sparse() -> None:
    run = Followed({3: 0.9, 5: 0.95})
    for step in range(STEPS):
        run.step(0.9, 1.0 if step else None)
    assert run.told[0].found == pytest.approx(0.95)


def test_what_the_guard_sends_away_is_no_step() -> None:
    run = Followed({3: 0.9, 5: 0.95})
    for _ in range(3):
        run.step(0.9, None)
    for _ in range(TRIES - 4):
        run.step(None, None)
    assert run.told == []
    run.step(None, None)
    assert not run.check.is_due
    assert run.told == [Recall(pytest.approx(0.9), 0.9, 3)]  # type: ignore[arg-type]


def test_nothing_is_said_where_nothing_ran_sparse() -> None:
    run = Followed({3: 0.9, 5: 0.95})
    for _ in range(TRIES):
        run.step(None, None)
    assert not run.check.is_due
    assert run.told == []


def test_nothing_is_expected_of_thresholds_that_were_given() -> None:
    run = Followed({3: None, 5: None})
    for _ in range(STEPS):
        run.step(0.1, 0.1)
    assert run.told[0].expected is None
    assert not run.told[0].is_low


@pytest.mark.parametrize(
    ("expected", "lowest"), [(0.98, 0.93), (0.95, 0.9), (0.93, 0.86), (0.9, 0.8), (0.6, 0.5)]
)  # fmt: skip
def test_the_margin_is_what_is_missed_anyway_within_bounds(expected: float, lowest: float) -> None:
    assert not Recall(lowest + 1e-6, expected, STEPS).is_low
    assert Recall(lowest - 1e-6, expected, STEPS).is_low


def test_what_is_no_number_is_low() -> None:
    assert Recall(math.nan, 0.9, STEPS).is_low
