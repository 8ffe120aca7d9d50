# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Whether an indexer covers what it should of the attention of a model that it may not have been trained for.

Looked at in the first sparse steps of a worker, and then never again. Plain Python: no tensor, no vLLM. A layer adds up
the recall of a few rows; what it has added up is known when the step is over, on a GPU some steps later, without
anybody waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

STEPS = 8
"""Steps with sparse rows that are looked at."""

TRIES = 64
"""Steps after which no other is looked at, also where the guard has sent so many away that fewer ran sparse."""

ROWS = 16
"""Rows of a chunk whose true attention is computed."""

LEAST, MOST = 0.05, 0.1
"""By how much the recall of a fitting indexer is lower at most, from one text to another: as much again as is expected
to be missed, within these bounds."""


@dataclass(frozen=True, slots=True)
class Recall:
    """What was found.

    Attributes:
        found: share of the true attention that was covered, the mean over layers.
        expected: what should have been, the mean over the same layers; None where nothing is known of it.
        steps: that were looked at.
    """

    found: float
    expected: float | None
    steps: int

    @property
    def is_low(self) -> bool:
        """Whether the indexer does not fit the model."""
        if self.expected is None:
            return False
        margin = min(max(1.0 - self.expected, LEAST), MOST)
        return not self.found >= self.expected - margin  # neither does what is no number


class RecallCheck:
    """Follows the first sparse steps of one worker.

    The layers of a step ask ``is_due``, look, and ``mark`` that they have; ``take`` ends the step. ``read`` may be
    called by another thread, step by step.

    Args:
        expected: recall that is expected of each layer, by its index; None where nothing is.
        tell: takes what was found, once.
    """

    def __init__(self, expected: Callable[[int], float | None], tell: Callable[[Recall], None]) -> None:
        self._expected = expected
        self._tell = tell
        self._is_marked = False
        self._tries = self._reads = self._steps = 0
        self._number = 0.0
        self._is_over = False

    @property
    def is_due(self) -> bool:
        """Whether the layers shall look in this step."""
        return not self._is_over and self._tries < TRIES

    def mark(self) -> None:
        """A layer has looked."""
        self._is_marked = True

    def take(self) -> bool:
        """End a step; whether ``read`` wants the totals after it."""
        marked, self._is_marked = self._is_marked, False
        self._tries += marked
        return marked

    def read(self, totals: Mapping[int, tuple[float, float]]) -> None:
        """Take over the totals after a step that ``take`` wanted them of.

        Args:
            totals: by layer, recall summed over what was looked at, and the number of what was.
        """
        self._reads += 1
        number = sum(count for _, count in totals.values())
        self._steps += number > self._number
        self._number = number
        if self._is_over or (self._steps < STEPS and self._reads < TRIES):
            return
        self._is_over = True
        found = {layer: total / count for layer, (total, count) in totals.items() if count}
        if found:  # otherwise everything was handed back, which is told elsewhere
            expected = [self._expected(layer) for layer in found]
            known = [value for value in expected if value is not None]
            self._tell(
                Recall(
                    math.fsum(found.values()) / len(found),
                    math.fsum(known) / len(known) if len(known) == len(found) else None,
                    self._steps,
                )
            )
